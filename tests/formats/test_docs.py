"""What docs/formats.md says works as written."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from mpq_compiler import formats
from mpq_compiler.ir import costs, stored_tensors
from mpq_compiler.ir.exact_interpreter import run_exact
from mpq_compiler.ir.interpreter import run
from mpq_compiler.pipeline import manager
from mpq_compiler.pipeline.parser import parse
from mpq_compiler.pipeline.session import Session
from tests.harness import programs
from tests.harness.tree import ROOT

TEXT = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")


def block(language: str, containing: str) -> str:
    (found,) = (b for b in re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL) if containing in b)
    return found


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The package of "Add a format" as pip leaves it on the path."""
    project = tomllib.loads(block("toml", "[project]"))["project"]
    (tmp_path / "mpq_powers.py").write_text(block("python", "PowersOfTwo"))
    info = tmp_path / "mpq_powers-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    (group,) = project["entry-points"].items()
    entries = "\n".join(f"{name} = {value}" for name, value in group[1].items())
    (info / "entry_points.txt").write_text(f"[{group[0]}]\n{entries}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mpq_powers", None)


def test_add_a_format(installed):
    model = "pixart"
    command = block("sh", "uniform=pow3").replace("\\\n", "")
    pipeline = re.search(r'--pipeline "(.*?)"', command)[1].replace("calibrate", "calibrate{samples=3,steps=5}", 1)
    stages = {}
    manager.run_pipeline(
        parse(pipeline),
        programs.empty(),
        Session(programs.denoiser(model), programs.calibration(model)),
        [lambda index, step, before, program: stages.__setitem__(step.name(), program)],
    )
    packed = stages["fuse-epilogues"]
    x = programs.inputs(model, 2)
    assert torch.equal(run_exact(stages["round-weights"], x), run(packed, x))
    payload = sum(tensor.array.nbytes for tensor in stored_tensors.stored(packed).values())
    assert payload == costs.stored_bytes(stages["bit-allocation"])
    w = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
    found = formats.get("pow3")
    powers = found.fit(w).dequantize().abs() / found.fit(w).scale.float()
    assert {*powers.unique().tolist()} <= {1.0, 2.0, 4.0, 8.0} and formats.get("pow3+r8").base is found


def test_every_name_of_the_page_is_a_format():
    table = TEXT.split("## The formats")[1].split("- Scales")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    names = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert names >= {*formats.FORMATS}
    for name in names:
        assert formats.get(name).name == name
    pipelines = re.findall(r'--pipeline "(.*?)"', TEXT.replace("\\\n", ""))
    assert len(pipelines) == 2 and parse(pipelines[0])
