"""Faults are injected into real passes; bisecting their dumps names the pass and the layers, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, fx

from mpq_compiler import schemas
from mpq_compiler.driver import dump_writer
from mpq_compiler.driver.instruments import observe
from mpq_compiler.inspection import bisect
from mpq_compiler.inspection.dumps import read_dumps
from mpq_compiler.ir.graph import prune, weight_of
from mpq_compiler.ir.program import TIME_GROUPS, Program
from mpq_compiler.pipeline import manager
from mpq_compiler.pipeline.passes import Pass
from mpq_compiler.pipeline.session import Session
from mpq_compiler.support.errors import UserError
from tests.harness import programs

INT4 = f"{programs.FRONT},bit-allocation{{uniform=int4}},{programs.BACK}"
GROUPED = f"{programs.FRONT},bit-allocation{{uniform=int4g16}},{programs.BACK}"
LAYERS = {
    "unet2d": ("conv_in", "time_embedding.linear_2", "mid_block.attentions.0.to_v", "up_blocks.1.resnets.1.conv2"),
    "pixart": ("transformer_blocks.1.ff.net.2", "transformer_blocks.0.attn1.to_v", "adaln_single.linear", "proj_out"),
}
MODELS = ("unet2d", "pixart")

Fault = Callable[[Program, Sequence[str]], None]


def faulty(step: Pass, fault: Fault, layers: Sequence[str]) -> Pass:
    """The pass of the same name and options, which does its work and then breaks those layers."""
    cls = type(step)

    def run(self: Any, program: Program, session: Session) -> Program:
        after = cls.run(self, program, session)
        fault(after, layers)
        prune(after.graph)
        return after

    made = type(cls.__name__, (cls,), {"run": run, "__module__": cls.__module__})
    return made(**{f.name: getattr(step, f.name) for f in dataclasses.fields(cls)})


@functools.cache
def clean(model: str, pipeline: str) -> tuple[Path, tuple[dump_writer.Writer, ...]]:
    """The dumps of a compilation without faults, and the writer as it was before each pass."""
    folder = Path(_FOLDER.name, str(len(_FOLDER_NAMES)))
    _FOLDER_NAMES.append(model)
    writer = dump_writer.Writer(folder, programs.inputs(model, 2), programs.denoiser(model))
    before = []
    for index, step in enumerate(programs.steps(model, pipeline)):
        before.append(copy_of(writer, folder))
        writer.write(index, step.step, step.before, step.after)
    return folder, tuple(before)


_FOLDER = tempfile.TemporaryDirectory()
_FOLDER_NAMES: list[str] = []


def copy_of(writer: dump_writer.Writer, folder: Path) -> dump_writer.Writer:
    """Another writer that goes on from here, elsewhere."""
    other = copy.copy(writer)
    for name, value in vars(writer).items():
        setattr(other, name, dict(value) if isinstance(value, dict) else value)
    other.folder = folder
    return other


def verdict(folder: Path, model: str, broken: str, fault: Fault, layers: Any, pipeline: str = "", more: int = 1):
    """The verdict on a compilation in which the pass ``broken`` has a fault, ``more`` passes after it."""
    pipeline = pipeline or INT4
    steps = programs.steps(model, pipeline)
    start = next(i for i, s in enumerate(steps) if s.step.name() == broken)
    recorded, writers = clean(model, pipeline)
    for path in recorded.iterdir():
        if path.name[:3].isdigit() and int(path.name[:3]) < start:
            shutil.copy(path, folder)
    writer = copy_of(writers[start], folder)
    manager.run_pipeline(
        [faulty(steps[start].step, fault, layers), *(s.step for s in steps[start + 1 : start + 1 + more])],
        steps[start].before,
        Session(programs.denoiser(model), programs.calibration(model)),
        [observe, lambda i, step, before, after: writer.write(start + i, step, before, after)],
        frozenset().union(*(s.step.provides for s in steps)),
    )
    return bisect.bisect(read_dumps(folder))


def named(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(f["after"], f["layers"][0]) for p in found["passes"] for f in p["findings"]]


# --- faults -------------------------------------------------------------------------------------------------


def call_of(program: Program, layer: str) -> fx.Node:
    name = layer.replace(".", "_")
    return next(n for n in program.graph.nodes if n.name == name)


def replace_stored(program: Program, old: str, tensor: Tensor) -> str:
    """Every read of a stored tensor becomes one of another; plans of activations follow."""
    new = program.tensors.add(old if ":" in old else f"{old}:changed", tensor)
    assert new != old
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target) == old:
            node.target = new
    for edge, plan in program.activations.items():
        changes = {key: new for key in ("scale", "zero_point") if getattr(plan, key) == old}
        if changes:
            program.activations[edge] = dataclasses.replace(plan, **changes)
    return new


def edge_of(program: Program, layer: str) -> str:
    x = call_of(program, layer).args[0]
    assert isinstance(x, fx.Node)
    return x.name.removesuffix("_q")


def wrong_permutation(program: Program, layers: Sequence[str]) -> None:
    """Convolutions read their taps transposed, linear layers their inputs in reverse."""
    for layer in layers:
        name = str(weight_of(call_of(program, layer)))
        tensor = program.tensors[name]
        replace_stored(program, name, tensor.transpose(1, 2).contiguous() if tensor.dim() == 4 else tensor.flip(1))


def dropped_group(program: Program, layers: Sequence[str]) -> None:
    """The inputs of one time group were dropped but for its quietest, at a quarter of the narrowest group's range."""
    for layer in layers:
        name = program.activations[edge_of(program, layer)].scale
        table = program.tensors[name].clone()
        table[int(table.argmax())] = table.min() / 4
        replace_stored(program, name, table)


def wrong_scale(program: Program, layers: Sequence[str]) -> None:
    """The activation's scale is one and a half times what it should be."""
    for layer in layers:
        name = program.activations[edge_of(program, layer)].scale
        replace_stored(program, name, program.tensors[name] * 1.5)


def swapped_rows(program: Program, layers: Sequence[str]) -> None:
    for layer in layers:
        (name,) = {str(n.target) for n in program.graph.nodes if n.op == "get_attr" and codes_of(layer, str(n.target))}
        codes = program.tensors[name].clone()
        codes[[0, len(codes) - 1]] = codes[[len(codes) - 1, 0]]
        replace_stored(program, name, codes)


def codes_of(layer: str, name: str) -> bool:
    return name in (f"{layer}.weight:codes", f"{layer}.weight:base.codes")


def off_by_one(program: Program, layers: Sequence[str]) -> None:
    """The zero point of the last time group is one more (one less where there is no more)."""
    for layer in layers:
        name = program.activations[edge_of(program, layer)].zero_point
        zero = program.tensors[name].clone()
        zero[-1] = zero[-1] + 1 if zero[-1] < 255 else zero[-1] - 1
        replace_stored(program, name, zero)


FAULTS = {
    "layout": wrong_permutation,
    "bit-allocation": dropped_group,
    "insert-fake-quant": wrong_scale,
    "round-weights": swapped_rows,
    "fold-fake-quant": off_by_one,
}


@pytest.mark.parametrize("broken", FAULTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_fault_is_named_by_pass_and_layer(tmp_path, model, broken):
    layers = LAYERS[model]
    found = verdict(tmp_path, model, broken, FAULTS[broken], layers)
    findings = [f for p in found["passes"] for f in p["findings"]]
    assert found["pass"] == broken and found["layer"] in findings[0]["layers"]
    assert [f["after"] for f in findings] == [broken] * len(layers), found["sentence"]
    # A tensor that several layers read is named with all of them.
    assert all(set(f["layers"]) & set(layers) for f in findings)
    assert {*layers} <= {layer for f in findings for layer in f["layers"]}
    assert found["sentence"].startswith(broken) and findings[0]["layers"][0] in found["sentence"]


@pytest.mark.parametrize("model", MODELS)
def test_a_clean_compilation_has_nothing_wrong(model):
    found = bisect.bisect(read_dumps(clean(model, INT4)[0]))
    assert found["clean"], found["sentence"]
    assert found["pass"] is None and "nothing is wrong" in found["sentence"]


# --- other faults -------------------------------------------------------------------------------------------


def dropped_boundary(program: Program, layers: Sequence[str]) -> None:
    program.facts[TIME_GROUPS] = program.facts[TIME_GROUPS][:-1]


def flipped_branch(program: Program, layers: Sequence[str]) -> None:
    """The binary branch is subtracted."""
    for layer in layers:
        name = f"{layer}.weight:alpha"
        replace_stored(program, name, -program.tensors[name])


def dropped_k_group(program: Program, layers: Sequence[str]) -> None:
    """The first channels are scaled as the last ones are, the other way round."""
    for layer in layers:
        name = f"{layer}.weight:scale"
        scale = program.tensors[name].clone()
        scale[:, 0] = scale[:, -1].flip(0)
        replace_stored(program, name, scale)


def moved_bias(program: Program, layers: Sequence[str]) -> None:
    """One channel's bias is a hundredth of a percent larger."""
    for layer in layers:
        read = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
        (name,) = [name for name in read if name.startswith(f"{layer}.bias")]
        bias = program.tensors[name].clone()
        bias[1] = bias[1] * 1.01
        replace_stored(program, name, bias)


def broken_value(program: Program, layers: Sequence[str]) -> None:
    for layer in layers:
        name = str(weight_of(call_of(program, layer)))
        replace_stored(program, name, program.tensors[name].sign() * 3e38)


OTHERS = [
    ("time-groups", dropped_boundary, (), INT4, "groups"),
    ("residual-branch", flipped_branch, ("transformer_blocks.0.attn2.to_k", "proj_out"), programs.RESIDUAL, "rows"),
    ("round-weights", dropped_k_group, ("transformer_blocks.1.ff.net.2",), GROUPED, "rows"),
    ("trace", moved_bias, ("proj_out", "transformer_blocks.0.attn1.to_q"), INT4, "value"),
    ("calibrate", moved_bias, ("transformer_blocks.1.attn1.to_k",), INT4, "value"),
    ("fuse-epilogues", moved_bias, ("transformer_blocks.0.ff.net.0.proj", "proj_out"), INT4, "value"),
]


@pytest.mark.parametrize(("broken", "fault", "layers", "pipeline", "kind"), OTHERS)
def test_other_faults(tmp_path, broken, fault, layers, pipeline, kind):
    found = verdict(tmp_path, "pixart", broken, fault, layers, pipeline)
    assert found["pass"] == broken, found["sentence"]
    findings = [f for p in found["passes"] for f in p["findings"]]
    assert {f["kind"] for f in findings} <= {kind, "weight"}
    told = {layer for f in findings for layer in f["layers"]}
    assert {*layers} <= told
    if kind == "groups":
        assert "2 time groups of 3 that were decided on: boundary" in found["sentence"] and len(findings) == 1
    else:
        assert len(findings) == len(layers)


def test_rows_and_channels_are_named(tmp_path):
    layer = "transformer_blocks.1.ff.net.2"
    found = verdict(tmp_path, "pixart", "round-weights", swapped_rows, [layer])
    last = len(programs.denoiser("pixart").module.model.get_submodule(layer).weight) - 1
    assert f"row 0 is nearest to {last}, {last} is nearest to 0" in found["sentence"]


def test_a_departing_channel_is_named(tmp_path):
    found = verdict(tmp_path, "pixart", "calibrate", moved_bias, ["proj_out"])
    (finding,) = found["passes"][2]["findings"]
    assert finding["layers"] == ["proj_out"] and "in channel 1 (1 of 32)" in finding["sentence"]


def test_what_is_not_finite_is_named_once(tmp_path):
    """The verifier sees what is stored; what overflows only when it runs is seen here."""
    layer = "transformer_blocks.0.ff.net.2"
    found = verdict(tmp_path, "pixart", "layout", broken_value, [layer], more=0)
    findings = [f for p in found["passes"] for f in p["findings"]]
    assert found["pass"] == "layout" and {name for f in findings for name in f["layers"]} == {layer}
    assert findings[0]["measured"] is None


@pytest.mark.parametrize(("missing", "gap"), [(0, "layout"), (3, "bit-allocation")])
def test_dumps_with_a_gap(tmp_path, missing, gap):
    folder, _ = clean("pixart", INT4)
    for path in folder.iterdir():
        if path.name[:3].isdigit() and int(path.name[:3]) != missing:
            shutil.copy(path, tmp_path)
    with pytest.raises(UserError, match=f"before that of '{gap}' is missing; bisect needs"):
        bisect.bisect(read_dumps(tmp_path))


@pytest.mark.parametrize("pipeline", [programs.MIXED, programs.RESIDUAL, GROUPED, *programs.PIPELINES[1:]])
def test_no_pipeline_is_blamed_without_a_fault(pipeline):
    found = bisect.bisect(read_dumps(clean("pixart", pipeline)[0]))
    assert found["clean"], found["sentence"]
    assert all(p["nodes"] > 20 for p in found["passes"])
    assert schemas.check(found, "inspect") is None


@pytest.mark.parametrize("model", ["fashion-unet", "sd15"])
def test_no_model_is_blamed_without_a_fault(model):
    folder, _ = clean(model, INT4)
    dumps = read_dumps(folder)
    found = bisect.bisect(dumps)
    assert found["clean"], found["sentence"]
    # Some numbers a node and a layer, and 64 values: probes do not grow with the model's width.
    largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert largest < 2000 * max(d.nodes for d in dumps)
