"""Calls that join once all are known: the same bits from fewer calls, and what is left is listed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mpq_compiler.backends.tvm.build import build
from mpq_compiler.backends.tvm.lowering import lower
from mpq_compiler.backends.tvm.plan import fuse, stages
from mpq_compiler.backends.tvm.plan.calls import Call, Function, Kernel, Value, record
from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.targets import table as targets
from tests.harness import packed

TARGET = "x86-64-avx2"


def with_copies(function: Function) -> Function:
    return replace(function, copied=tuple(fuse.copies(function.own).items()))


def step(name: str, weights: str = "int8") -> tuple[Call, ...]:
    return lower(packed.program(name, weights).program, (1,)).functions[0].own


@pytest.fixture
def unfused(monkeypatch):
    def apply() -> None:
        """Every stage that joins calls leaves the plan as it is."""
        for stage in (*stages.JOINING[:-1], stages.ConcatenateInPlace):
            monkeypatch.setattr(stage, "changed", lambda self, function: with_copies(function))

    return apply


@pytest.mark.parametrize("name", ["unet2d-17x23", "flux"])
def test_joined_calls_give_the_bits_of_single_ones(name, unfused, tmp_path):
    """Odd channels, images that no tile divides, skip connections, joint attention; batches of 1 and 4."""
    case, target = packed.program(name, "int8"), targets.resolve(TARGET)
    if targets.missing_features(target):
        pytest.skip("not this machine's target")
    results, calls = [], []
    for kind in ("fused", "single"):
        built = build(case.program, target, (1, 4), jobs=2, cache=packed.kernel_cache())
        path = packed.write(tmp_path / f"{kind}.mpq", case.program, target, built)
        inputs = {key: value[:5].numpy() for key, value in case.inputs.items()}
        results.append(compiled_denoiser.load(path, threads=1).run(inputs))
        calls.append(built.facts["calls"])
        unfused()
    assert calls[0] < calls[1]
    assert np.array_equal(*results)


@pytest.mark.parametrize("name", ["unet2d", "sd15"])
def test_unets_copy_no_concatenation_and_have_no_lone_quantizer(name, unfused):
    found = Counter(call.kernel.problem.type for call in step(name))
    assert not found["quantize.Quantize"] and found["movement.Movement"] == 1  # the output's permute
    assert not fuse.copies(step(name))
    assert all(
        dict(call.kernel.problem.fields)["dtype"] == "uint8"
        for call in step(name)
        if call.kernel.problem.type == "movement.upsample"
    )
    unfused()
    before = Counter(call.kernel.problem.type for call in step(name))
    joined = before["movement.Movement"] - 1
    assert joined >= 4 and len(fuse.copies(step(name))) == joined
    assert before["quantize.Quantize"] >= joined + 2
    single = sum(before.values()) - sum(found.values())
    assert single == joined + before["quantize.Quantize"]


def test_every_result_keeps_its_name(unfused):
    """What others read, and what tests and probes look for, is made by some call still."""
    fused = step("unet2d")
    unfused()
    whole = step("unet2d")
    made, before = ({name for call in calls for _, name in call.results} for calls in (fused, whole))
    gone = {name.split("|")[0] for name in before - made}
    assert gone and all("cat" in name or "upsample" in name or name.endswith("_add") for name in gone)
    known = made | {"sample", "g"} | {name for call in fused for _, name in call.operands if name not in before}
    assert all(name in known for call in fused for _, name in call.operands)


def test_tokens_are_written_where_they_belong(unfused):
    """Joint attention puts tokens one behind another: nothing but attention reads them."""
    written = [call for call in step("flux") if call.into]
    assert Counter(call.kernel.problem.type for call in written) == {"norms.RmsNorm": 4, "problem.QuantMatmul": 4}
    assert not fuse.copies(step("flux"))
    for call in written:
        size, offset, row = call.kernel.problem.get("into")
        assert 0 <= offset < size and row <= size
    unfused()
    assert len(fuse.copies(step("flux"))) > 4 and not any(call.into for call in step("flux"))


def joining(axis: int) -> tuple[list[Call], dict[str, Value]]:
    """A product of 4 channels for 3 tokens and an input beside (or behind) it; the product is read by nothing else."""
    shapes = {"made": ("B", 3, 4), "given": ("B", 3, 2) if axis == 2 else ("B", 5, 4)}
    total = ("B", 3, 6) if axis == 2 else ("B", 8, 4)
    target, offset = ((0, 6, 1), 4) if axis == 2 else ((0, 4, 1), 12)
    copies = [
        record(
            "movement.Copy", source=i, extents=(1, *shapes[name][1:]), source_strides=(0, shapes[name][-1], 1),
            source_offset=0, target_strides=target, target_offset=i * offset,
        )
        for i, name in enumerate(shapes)
    ]  # fmt: skip
    join = record("movement.Movement", inputs=[*shapes.values()], shape=total, copies=copies, dtype="float32")
    product = record("problem.QuantMatmul", height=3, width=1, rank=3, channels=8, outputs=4)
    calls = [
        Call(Kernel("gemm", product), (("x", "codes"),), (("out", "made"),), "made"),
        Call(Kernel("movement", join), (("x0", "made"), ("x1", "given")), (("y", "joined"),), "joined"),
        Call(Kernel("movement", join), (("x0", "joined"),), (("y", "y"),), "y"),
    ]
    return calls, {"made": Value("made", shapes["made"], "float32"), "joined": Value("joined", total, "float32")}


@pytest.mark.parametrize(("axis", "into"), [(1, (32, 0, 4)), (2, (18, 0, 6))])
def test_what_cannot_be_written_in_place_is_copied_there_and_listed(axis, into):
    calls, values = joining(axis)
    made, copied, _ = fuse.in_place(calls, values, "y")
    assert (made.into, made.kernel.problem.get("into")) == ("joined", into)
    assert (copied.into, copied.operands) == ("joined", (("x0", "given"),))
    assert "'given' by no kernel" in fuse.copies([made, copied])["joined"]
    again = [*calls, replace(calls[0], operands=(("x", "made"),), results=(("out", "more"),))]
    assert not any(call.into for call in fuse.in_place(again, values, "y"))  # others read it as well


@pytest.mark.parametrize("name", ["unet2d-class", "pixart"])
def test_norms_rotate_what_they_make(name, unfused):
    """What attentions and activations make has a kernel of its own, and so has what others read unrotated."""
    program = packed.program(name, "int4", "rotate{rule=everywhere,rows=8}").program

    def rotations() -> Counter[str]:
        problems = [call.kernel.problem for call in lower(program, (1,)).functions[0].own]
        return Counter(p.type for p in problems if p.type == "hadamard.Hadamard" or dict(p.fields).get("block"))

    found = rotations()
    whole, program = program, program.fork()
    for graph in (program.graph, *program.regions.values()):
        for node in [n for n in graph.nodes if n.target is ops.hadamard]:
            with graph.inserting_after(node):
                new = graph.call_function(aten.silu.default, (node,))
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
    between = rotations()
    assert between.keys() == {"hadamard.Hadamard"} and between.total() == found.total()  # its steps follow a rotation
    program = whole
    unfused()
    alone = rotations()
    assert alone.keys() == {"hadamard.Hadamard"} and found.total() == alone.total()
    assert found["norms.GroupNorm" if "unet" in name else "norms.LayerNorm"] > 2
