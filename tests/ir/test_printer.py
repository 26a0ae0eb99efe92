"""The textual IR against golden texts (``pytest --accept`` writes them), docstrings of passes against real programs."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mpq_compiler.driver import dump_writer
from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.inspection.dumps import OUTPUT, VALUES, read_dumps
from mpq_compiler.ir import costs, diff, printer, views
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline import describe, manager, parser, registry
from mpq_compiler.pipeline.registry import BUILT_IN as PASSES
from mpq_compiler.pipeline.session import Session
from mpq_compiler.support.errors import UserError
from tests.harness import programs, tiny

GOLDEN = Path(__file__).parents[1] / "golden"
PLAIN = programs.RESIDUAL.replace("int2+b", "int3")
UNCHANGED = (
    "calibrate", "time-groups", "time-gains", "sensitivity", "step-reuse", "predict-scores", "orthogonality",
)  # fmt: skip
SHOWN = {
    **{p.name(): ("unet2d", PLAIN) for p in parser.parse(PLAIN)},
    "residual-branch": ("unet2d", programs.RESIDUAL),
    "low-rank": ("unet2d", programs.LOW_RANK),
    "bos-split": ("sd15", programs.REWRITES),
    "equalize": ("fashion-unet", programs.REWRITES),
    "keep-values": ("unet2d", programs.KEPT),
}
"""The model and the pipeline that show a pass, where they are not "unet2d" and `programs.having`."""


@functools.cache
def golden_steps() -> tuple[tuple[str, Program], ...]:
    """A PixArt of one block, after every pass but the measured ones."""
    found: list[tuple[str, Program]] = []
    denoiser = denoisers.wrap(tiny.model("pixart", num_layers=1), name="pixart-1")
    inputs = denoiser.random_inputs(12, 3)
    inputs["timestep"] = programs.calibration("pixart")["timestep"]
    manager.run_pipeline(
        parser.parse(programs.RESIDUAL),
        programs.empty(),
        Session(denoiser, inputs),
        [lambda i, p, before, after: found.append((p.name(), after))],
    )
    return tuple(found)


WHOLE = [p.name() for p in parser.parse(programs.RESIDUAL) if p.name() not in UNCHANGED]
CHANGES = [name for name in PASSES if name not in (*WHOLE, *UNCHANGED, "equalize", "distill")]
"""Other passes show what they change. What `equalize` chooses, and what is trained, hangs on the last bits of sums."""


@pytest.mark.parametrize("name", [*WHOLE, *CHANGES])
def test_golden(name, request):
    """The whole text, or all that a pass changes, both ways: no line more, none less."""
    if name in WHOLE:
        text = printer.text(dict(golden_steps())[name], name)
    else:
        step = shown(name)
        text = diff.diff(printer.text(step.before), printer.text(step.after), 0)
    path = GOLDEN / f"{name}.txt"
    if request.config.getoption("--accept"):
        path.write_text(text, encoding="utf-8")
    expected = path.read_text(encoding="utf-8") if path.exists() else ""
    assert text == expected, f"{diff.diff(expected, text)}\n(pytest --accept writes {path.name} anew)"


def shown(name: str) -> programs.Step:
    model, pipeline = SHOWN.get(name, ("unet2d", None))
    return programs.step(model, name, pipeline)


def test_no_golden_text_is_left_over():
    assert sorted(p.name for p in GOLDEN.glob("*.txt")) == sorted(f"{n}.txt" for n in (*WHOLE, *CHANGES))


def test_text_is_the_same_every_time():
    program = programs.after("unet2d", "fuse-epilogues")
    assert printer.text(program) == printer.text(program.fork())


@pytest.mark.parametrize("model", programs.MODELS)
def test_every_call_has_one_line(model):
    for step in programs.steps(model):
        text = printer.text(step.after, step.step.name())
        lines = [line for line in text.splitlines() if re.match(r" +%\S+ += ", line)]
        assert len(lines) == len(views.flatten(step.after)) + len(step.after.regions)
        assert not re.search(r"0x[0-9a-f]{6}|torch\.|<built-in", text)
        assert text.splitlines()[0].startswith(f"// {step.step.name()}: {step.after.stage} stage")


@pytest.mark.parametrize("model", programs.MODELS)
def test_bytes_stay_those_of_the_plan(model):
    """In every later stage the header counts what the planned stage promised."""
    planned = costs.stored_bytes(programs.after(model, "bit-allocation"))
    for step in programs.steps(model):
        if step.after.weights:
            assert printer.stored_bytes(step.after) == planned, step.step.name()


def test_numbers():
    assert [printer.number(v) for v in (1e-5, 0.5, 0.353553, 123456.0, 1 / 300, 2.0)] == [
        "1e-05",
        "0.5",
        "0.35",
        "1.2e+05",
        "3.3e-03",
        "2.0",
    ]


def test_shapes_are_in_terms_of_the_batch():
    text = printer.text(programs.after("unet2d", "layout"))
    assert re.search(r"%conv_in +=.* f32\[B,16,16,32\]", text)
    assert "graph unet2d(%sample f32[B,3,16,16], %timestep f32[B]) -> f32[B,3,16,16] {" in text


def test_table_of_layers():
    program = programs.after("unet2d", "bit-allocation")
    rows = printer.table_of_layers(program)
    assert [r.name for r in rows] == [n.name for n in program.quantizable]
    fixed = costs.fixed_bytes(program, sum(plan.group_bytes for plan in program.activations.values()), 3)
    assert sum(r.bytes for r in rows) + fixed == costs.stored_bytes(program)
    assert all(r.activation == "u8/t3" and r.fallback is None and r.loss > 0 for r in rows)
    after = printer.table_of_layers(programs.after("unet2d", "fuse-epilogues"))
    assert sorted(after, key=lambda r: r.name) == sorted(rows, key=lambda r: r.name)


# --- differences --------------------------------------------------------------------------------------------


def test_diff():
    before = "graph {\n  %a    = f(%x)\n  %b    = g(%a)\n  %c    = h(%b)\n  return %c\n}\n"
    assert diff.diff(before, before) == ""
    assert diff.diff(before, before.replace("    =", " =")) == ""  # columns that moved are no change
    assert diff.diff(before, before.replace("g(%a)", "g(%x)"), context=1) == (
        "@@ 1 lines the same @@\n  %a    = f(%x)\n".replace("  %a", "    %a")
        + "-   %b    = g(%a)\n+   %b    = g(%x)\n    %c    = h(%b)\n@@ 2 lines the same @@\n"
    )
    assert diff.diff("", "x\n") == "+ x\n"


def test_diff_of_a_pass_shows_what_it_did():
    step = programs.step("pixart", "insert-fake-quant")
    lines = diff.diff(printer.text(step.before), printer.text(step.after)).splitlines()
    added = [line for line in lines if line.startswith("+")]
    assert sum("mpq::fake_quantize(" in line for line in added) == len(step.after.activations)
    assert not [line for line in lines if line.startswith("-") and "mpq::fake_quantize" in line]


# --- passes -------------------------------------------------------------------------------------------------


def occurs(line: str, text: str) -> bool:
    """Is the line of an excerpt a line of the text, ``...`` standing for anything and columns aside?"""
    parts = [r"\s+".join(map(re.escape, part.split())) for part in line.strip().split("...")]
    pattern = r".*?".join(rf"\s*{part}\s*" if part else "" for part in parts)
    return re.search(r"^\s*" + pattern, text, re.MULTILINE) is not None


@pytest.mark.parametrize("name", PASSES)
def test_the_excerpt_of_a_pass_is_real(name):
    """Each line of the docstring's before and after stands in the program before and after the pass."""
    before, after = describe.excerpt(registry.find(name))
    assert before and after, "a pass shows what it does"
    if name in UNCHANGED:
        assert "no change" in before and "no change" in after
        return
    step = shown(name)
    text = printer.text(step.after)
    assert not [line for line in after.splitlines() if not occurs(line, text)]
    if step.before.inputs:
        text = printer.text(step.before)
        assert not [line for line in before.splitlines() if not occurs(line, text)]
    else:  # what torch.export gives is no program yet; its operators exist
        operators = re.findall(r"aten\.(\w+)", before)
        assert operators and all(hasattr(torch.ops.aten, operator) for operator in operators)
    earlier = printer.text(step.before) if step.before.inputs else ""
    assert not all(occurs(line, earlier) for line in after.splitlines()), "nothing there is the doing of this pass"


def test_an_excerpt_that_is_not_real_is_seen():
    text = printer.text(programs.after("unet2d", "layout"))
    assert occurs("%conv_in = mpq::conv2d(%permute_default, ..., padding=[1,1,1,1])", text)
    assert not occurs("%conv_in = mpq::conv2d(%permute_default, ..., padding=[2,2,2,2])", text)
    assert not occurs("%conv_in = aten.conv2d(...)", text)


def test_describe_pass():
    described = describe.describe_pass(registry.find("bit-allocation"))
    assert described["name"] == "bit-allocation" and described["contract"] == "identical"
    assert described["requires"] == ["time-groups"] and described["provides"] == ["plan"]
    options = {o["name"]: o for o in described["options"]}
    assert options["weights"]["type"] == "float | none" and options["weights"]["default"] is None
    assert options["activations"]["default"] == 8.0
    text = describe.pass_text(described)
    assert "bit-allocation  (identical)" in text and "  =>" in text


def test_every_option_is_documented():
    for name in PASSES:
        described = describe.describe_pass(registry.find(name))
        assert described["summary"]
        assert not [o["name"] for o in described["options"] if not o["meaning"]], name


# --- dumps --------------------------------------------------------------------------------------------------


def dump(folder: Path, model: str = "pixart", count: int | None = None) -> None:
    writer = dump_writer.Writer(folder, programs.inputs(model, 2), programs.denoiser(model))
    for index, step in enumerate(programs.steps(model)[:count]):
        writer.write(index, step.step, step.before, step.after)


@pytest.mark.invariant("compiler-13")
def test_dumps_are_read_as_they_were_written(tmp_path):
    dump(tmp_path)
    dumps = read_dumps(tmp_path)
    steps = programs.steps("pixart")
    again = dump_writer.Writer(tmp_path / "again", programs.inputs("pixart", 2), programs.denoiser("pixart"))
    parts = {"weight": "weights", "rows": "rows", "groups": "groups", "edge": "edges", "value": "values"}
    for read, step in zip(dumps, steps, strict=True):
        arrays, _ = again.probe(step.step, step.after, step.before)
        for prefix, name in parts.items():
            part = {k.partition(":")[2]: v for k, v in arrays.items() if k.startswith(f"{prefix}:")}
            assert part.keys() == getattr(read, name).keys()
            for key, array in part.items():
                np.testing.assert_array_equal(getattr(read, name)[key], array)
        for name, departure in read.local.items():
            row = arrays[f"local:{name}"]
            assert [departure.largest, departure.noise, departure.share, departure.departing] == row[:4].tolist()
        assert read.expected == {k[9:]: float(v[0]) for k, v in arrays.items() if k.startswith("expected:")}
        np.testing.assert_array_equal(read.output, arrays[OUTPUT])
    assert [d.name for d in dumps] == [s.step.name() for s in steps]
    assert dumps[0].output_sqnr == math.inf and dumps[0].sqnr_db is None
    for found, step in zip(dumps, steps, strict=True):
        assert found.text == printer.text(step.after, found.name)
        assert max(len(v) for v in found.values.values()) <= VALUES
        names = {c.name for c in views.flatten(step.after)}
        assert {*found.values} <= names and len(found.values) > 0.8 * len(names)
        assert {*found.sqnr} <= {*found.values}
    by_name = {d.name: d for d in dumps}
    assert by_name["layout"].output_sqnr > 90 and min(by_name["layout"].sqnr.values()) > 90
    assert by_name["time-groups"].sqnr["proj_out"] == by_name["layout"].sqnr["proj_out"]
    assert 0 < by_name["fuse-epilogues"].output_sqnr < 60
    # Fused or not, a node's values are the same ones.
    for node, values in by_name["fuse-epilogues"].values.items():
        np.testing.assert_array_equal(values, by_name["fold-fake-quant"].values[node])


def test_equal_programs_give_equal_bytes(tmp_path):
    dump(tmp_path / "a", count=3)
    dump(tmp_path / "b", count=3)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_an_earlier_runs_dumps_go(tmp_path):
    dump(tmp_path, count=3)
    (tmp_path / "notes.txt").write_text("mine")
    dump(tmp_path, count=1)
    assert [d.name for d in read_dumps(tmp_path)] == ["trace"]
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("spoil", ["missing", "empty", "half", "broken"])
def test_folders_that_are_no_dumps(tmp_path, spoil):
    folder = tmp_path / "dumps"
    if spoil == "empty":
        folder.mkdir()
        (folder / "readme.txt").write_text("")
    elif spoil != "missing":
        dump(folder, count=1)
        if spoil == "half":
            (folder / "000-trace.txt").unlink()
        else:
            (folder / "000-trace.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"dumps?\b|safetensors"):
        read_dumps(folder)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the dumps cannot be written to"):
        dump(tmp_path / "file", count=1)
