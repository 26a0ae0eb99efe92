"""What does not depend on the latents, taken out of the step and kept between calls: the same bits, fewer calls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpq_compiler.artifact import bundle
from mpq_compiler.backends.tvm.build import _notes, build
from mpq_compiler.backends.tvm.lowering import lower
from mpq_compiler.backends.tvm.plan import hoist, stages
from mpq_compiler.backends.tvm.plan.calls import Call, Kernel, Value, record
from mpq_compiler.driver import specialize
from mpq_compiler.ir import specialization
from mpq_compiler.pipeline import parser
from mpq_compiler.runtime import compiled_denoiser, memo
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import table as targets
from tests.harness import packed

TARGET = "x86-64-avx2"
OTHER = (8, 8)


@pytest.fixture(scope="module")
def case():
    """Cross-attention, four time groups, a constant first token, two image sizes."""
    return packed.program("sd15", "int8", "split-shortcut,bos-split")


@pytest.fixture(scope="module")
def others(case):
    layout = parser.parse("trace,layout")
    there = specialize.laid_out(case.laid_out, case.denoiser, OTHER, layout)
    made = specialize.transplant(case.program, case.laid_out, there)
    return [specialization.Specialization(made, (1,))]


@pytest.fixture(scope="module")
def paths(case, others, tmp_path_factory):
    """(the artifact, the same without any part)."""
    target = targets.resolve(TARGET)
    if targets.missing_features(target):
        pytest.skip("not this machine's target")
    found = []
    for whole in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if whole:
                patch.setattr(stages.HoistInvariants, "run", lambda self, plan: plan)
            built = build(case.program, target, (1, 3), jobs=2, cache=packed.kernel_cache(), others=others)
        path = tmp_path_factory.mktemp("hoist") / f"{whole}.mpq"
        found.append(packed.write(path, case.program, target, built))
    assert "parts" in bundle.read(found[0]).manifest and "parts" not in bundle.read(found[1]).manifest
    return found


def calls(case) -> list[dict[str, np.ndarray]]:
    """Batches of several sizes, of mixed and of equal timesteps and texts, some of them twice; both image sizes."""
    inputs = {name: value.numpy() for name, value in case.inputs.items()}
    rows = ([0], [1], [0], [0, 1, 2], [2, 0, 1], [3, 3, 3, 3], [4, 5, 4, 5, 4], [0])
    found = [{name: value[list(chosen)] for name, value in inputs.items()} for chosen in rows]
    small = found[1]["sample"][:, :, :8, :8]
    one_text = found[5] | {"timestep": np.array([0, 333, 667, 999])}
    return [*found, found[1] | {"sample": small}, one_text, found[0] | {"timestep": np.array([999])}]


@pytest.mark.invariant("bitsfusion-1")
def test_bits_do_not_depend_on_what_is_kept(case, paths):
    split, whole = paths
    expected = [compiled_denoiser.load(whole, threads=1).run(inputs) for inputs in calls(case)]
    row = max(part.row_bytes for part in compiled_denoiser.load(split).executor.parts.values())
    for reuse_bytes in (memo.REUSE_BYTES, 0, 1, 6 * row):
        denoiser = compiled_denoiser.load(split, threads=1, reuse_bytes=reuse_bytes)
        for inputs, result in zip(calls(case), expected, strict=True):
            assert np.array_equal(denoiser.run(inputs), result)
        assert all(len(part._kept) <= part.rows for part in denoiser.executor.parts.values())
    assert {part.rows for part in compiled_denoiser.load(split, reuse_bytes=1).executor.parts.values()} == {2}


def test_what_is_known_is_not_computed_again(case, paths):
    denoiser = compiled_denoiser.load(paths[0], threads=1)
    parts = denoiser.executor.parts
    text, timestep = (case.inputs[name].numpy() for name in ("encoder_hidden_states", "timestep"))
    boundaries = denoiser.artifact.tensors()["time_groups.boundaries"]
    order = [0, 1, 0, 1, 2, 2]
    for row in order:
        denoiser.run({name: value.numpy()[[row]] for name, value in case.inputs.items()})
    assert parts["time"].computed == 3 and parts["text"].computed == 3
    denoiser.run({name: value.numpy()[[0, 1, 2]] for name, value in case.inputs.items()})
    assert parts["time"].computed == 3 and parts["text"].computed == 3
    steps = np.arange(999, 0, -50)
    for step in steps:  # one prompt: its keys and values are computed once a time group
        denoiser.run({"sample": case.inputs["sample"][:1].numpy(), "timestep": step, "encoder_hidden_states": text[:1]})
    groups = {*np.searchsorted(boundaries, [*steps, timestep[0]], "right").tolist()}
    assert len(groups) == 4 and parts["text"].computed == 3 + len(groups) - 1
    denoiser.forget()
    before = parts["time"].computed
    denoiser.run({name: value.numpy()[[0, 0, 0]] for name, value in case.inputs.items()})
    assert parts["time"].computed == before + 1  # the samples of a batch share it


def test_memory_is_bounded_and_taken_once(paths):
    denoiser = compiled_denoiser.load(paths[0], reuse_bytes=1 << 20)
    for part in denoiser.executor.parts.values():
        inputs = sum(array.nbytes for array, _ in part._arguments)
        most = max(1 << 19, 2 * (part.row_bytes + inputs))
        assert part.rows * part.row_bytes <= part.reserved_bytes <= most
    with pytest.raises(UserError, match="reuse_bytes is -1"):
        compiled_denoiser.load(paths[0], reuse_bytes=-1)


@pytest.mark.invariant("bitsfusion-2")
def test_functions_of_other_sizes_share_the_parts(case, others):
    lowered = lower(case.program, (1, 2), others)
    assert [*lowered.parts()] == ["time", "text"]
    first, second = lowered.functions
    assert first.parts == second.parts and first.own != second.own
    time, text = first.parts
    assert [value.name for value in time.inputs] == ["timestep"]
    assert {value.name for value in text.inputs} == {"encoder_hidden_states", "g"}
    of_time, of_text = ("time_emb_proj",), ("attn2_to_k", "attn2_to_v")
    for part, names in ((time, of_time), (text, of_text)):
        assert all(any(name in call.node for call in part.calls) for name in names)
    assert not [c.node for f in (first, second) for c in f.own if any(name in c.node for name in of_time + of_text)]


def test_contents_have_numbers():
    contents, draw = memo.Contents(4096, 3), np.random.default_rng(0)
    arrays = [draw.integers(0, 256, 4096).astype(np.uint8) for _ in range(4)]
    arrays[1][:-1] = arrays[0][:-1]  # they differ in the last byte
    assert [contents.number(arrays[i].copy()) for i in (0, 1, 0, 2, 1)] == [0, 1, 0, 2, 1]
    assert contents.number(arrays[3]) == 3  # in the place of the one that was not asked for longest
    assert [contents.number(arrays[i]) for i in (1, 2, 3, 0)] == [1, 2, 3, 4]
    assert contents.number(np.zeros(1024, np.float32)) != contents.number(np.full(1024, -0.0, np.float32))
    assert contents.nbytes == 3 * 4096


def node(name: str, *operands: str, dtype: str = "float32", shape=("B", 4)) -> tuple[Call, Value]:
    kernel = Kernel("movement", record("movement.Nothing"))
    read = tuple((f"x{i}", operand) for i, operand in enumerate(operands))
    return Call(kernel, read, (("y", name),), name), Value(name, shape, dtype)


def test_what_stays_in_the_step():
    inputs = [
        Value("sample", ("B", 3, 8, 8), "float32"),
        Value("timestep", ("B",), "int64"),
        Value("tokens", ("B", 7, 4), "float32"),
        Value("token_mask", ("B", 7), "float32"),
        Value("hint", ("B", 3, 8, 8), "float32"),
    ]
    made = [
        node("fill"),
        node("g", "timestep", dtype="int64"),
        node("emb", "timestep", "fill"),
        node("masked", "tokens", "token_mask", "fill"),
        node("keys", "masked", "g"),
        node("joint", "keys", "emb"),  # the timestep itself and texts: new in every step
        node("hinted", "hint"),
        node("flat", "timestep", shape=(4,)),  # not one row a sample
        node("y", "sample", "joint", "hinted", "flat", "emb", "g"),
    ]
    calls, values = [call for call, _ in made], {value.name: value for _, value in made}
    (time, text), step = hoist.split(inputs, calls, "y", values)
    assert [call.node for call in time.calls] == ["fill", "g", "emb"]
    assert [value.name for value in time.outputs] == ["g", "emb"]
    assert [call.node for call in text.calls] == ["fill", "masked", "keys"]
    assert [value.name for value in text.inputs] == ["tokens", "token_mask", "g"]
    assert [value.name for value in text.outputs] == ["keys"]
    assert [call.node for call in step] == ["joint", "hinted", "flat", "y"]
    assert hoist.mixed(inputs, calls, values) == ["joint", "flat"]


def test_what_is_not_kept_is_said():
    """Joint attention mixes texts with the time embedding; cross-attention does not."""
    (function,) = lower(packed.program("flux", "int8").program, (1,)).functions
    (note,) = _notes(function)
    assert f"{len(function.mixed)} of {len(function.own)} kernel calls" in note and "norm1_context" in note
    assert not _notes(lower(packed.program("sd15", "int8").program, (1,)).functions[0])


def test_copies_that_nobody_can_avoid_are_a_detail(caplog):
    (function,) = lower(packed.program("unet2d-class", "int8").program, (1,)).functions
    copied = ("joined", "'made' by gemm")
    with caplog.at_level("INFO", "mpq_compiler"):
        assert not _notes(replace(function, copied=(copied,)))
    assert copied in [record.args for record in caplog.records]
