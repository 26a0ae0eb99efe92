from __future__ import annotations

import pytest

from mpq_compiler.allocation import mixdq_groups
from mpq_compiler.allocation.costs import describe
from mpq_compiler.allocation.sensitivity_table import CONTENT, QUALITY
from mpq_compiler.ir import costs
from mpq_compiler.ir.program import PARAMETERS, TIME_GROUPS, Program
from mpq_compiler.pipeline import manager, parser
from mpq_compiler.pipeline.session import Session
from tests.harness import programs


def laid_out(model: str) -> Program:
    passes = parser.parse("trace,layout")
    return manager.run_pipeline(passes, programs.empty(), Session(programs.denoiser(model)))[0]


@pytest.mark.parametrize("model", ["sd15", "sdxl", "pixart", "hunyuan", "dit", "unet2d"])
def test_structure_finds_what_the_paper_finds_by_name(model):
    """Its lists are of the names with "ff" and "attn2" in them."""
    program = laid_out(model)
    found = mixdq_groups.groups(program)
    assert found.keys() == {costs.weight_path(node) for node in program.quantizable}
    assert set(found.values()) <= {CONTENT, QUALITY}
    for path, group in found.items():
        assert (group == CONTENT) == any(part in path.split(".") for part in ("ff", "attn2")), path


def test_joint_attention_is_quality_and_its_feed_forwards_are_content():
    found = mixdq_groups.groups(laid_out("sd3"))
    content = {path for path, group in found.items() if group == CONTENT}
    assert content and all(".ff." in path or ".ff_context." in path for path in content)


def test_the_table_holds_the_groups_and_sizes_of_layers():
    program = laid_out("pixart")
    program.facts |= {TIME_GROUPS: (), PARAMETERS: 1}
    layers = {layer["name"]: layer for layer in describe(program)["layers"]}
    assert {name: layer["group"] for name, layer in layers.items()} == mixdq_groups.groups(program)
    assert all(layer["weights"] == program.tensors[name].numel() for name, layer in layers.items())
