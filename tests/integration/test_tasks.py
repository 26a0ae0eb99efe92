"""Passes whose work is tasks: elsewhere they give what they give here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpq_compiler.allocation.pose import SCORES
from mpq_compiler.driver.instruments import observe
from mpq_compiler.ir import printer
from mpq_compiler.ir.findings import SENSITIVITY
from mpq_compiler.ir.interpreter import single_threaded
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline import manager, parser
from mpq_compiler.pipeline.session import Session
from tests.harness import programs
from tests.harness.post import Post

FLOATS = (
    f"{programs.FRONT},sensitivity{{inputs=2,probes=1,formats=fp4,activations=4}},"
    f"bit-allocation{{activation_format=float,activations=4}},{programs.BACK}"
)
PROBED = (
    f"{programs.FRONT},sensitivity{{inputs=2,probes=1,sampled=2000,formats=int3/int8}},"
    f"bit-allocation{{attention=8,weights=6}},{programs.BACK}"
).replace("round-weights", "round-weights{method=gptq}")
PIPELINES = {
    "some rows, attentions, GPTQ": (PROBED, {"_row_errors", "_estimate", "_fit_layer"}),
    "ablation of dynamic activations and attentions": (programs.ACTIVATIONS, {"_measure", "_integers"}),
    "small floats": (FLOATS, {"_floats", "_estimate"}),
    "low rank": (programs.LOW_RANK, {"_fit_layer"}),
    "random plans": (programs.SCORED, {"measure", "_learn"}),
}
"""Pipelines by what they have, with some of their tasks."""


def compiled(pipeline: str, cache: Path, cluster: Post | None = None) -> Program:
    session = Session(
        programs.denoiser("pixart"), programs.calibration("pixart"), cache=cache, cluster=cluster, jobs=2
    )
    with single_threaded():
        program, _ = manager.run_pipeline(parser.parse(pipeline), programs.empty(), session, [observe])
    return program


@pytest.mark.parametrize("name", PIPELINES)
def test_tasks_elsewhere_give_the_same_bits(name: str, tmp_path: Path) -> None:
    (pipeline, tasks), post = PIPELINES[name], Post()
    here, elsewhere = compiled(pipeline, tmp_path / "here"), compiled(pipeline, tmp_path / "elsewhere", post)
    assert tasks <= {*post.tasks}
    assert printer.text(elsewhere) == printer.text(here)
    for fact in (SENSITIVITY, SCORES):
        assert here.facts.get(fact) == elsewhere.facts.get(fact)
    read = {str(n.target) for n in here.graph.nodes if n.op == "get_attr"}
    assert read and all(torch.equal(here.tensors[n], elsewhere.tensors[n]) for n in read)
