"""The TVM backend against the packed program: contracts (a), (c) and (d) of docs/ir.md, errors, equal bytes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import operator
import shutil
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx

from mpq_compiler.artifact import bundle
from mpq_compiler.backends.tvm import templates
from mpq_compiler.backends.tvm.build import build, compile_library
from mpq_compiler.backends.tvm.compile.worker import Crash, Failure, Worker
from mpq_compiler.backends.tvm.lowering import lower
from mpq_compiler.backends.tvm.plan.calls import Call, Function, Kernel, Lowered, Value, record
from mpq_compiler.ir import costs, ops
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import PARAMETERS, TIME_GROUPS, InputSpec, Program, Stage, TensorStore
from mpq_compiler.passes.fuse_epilogues import FuseEpilogues
from mpq_compiler.pipeline import manager, parser, session
from mpq_compiler.runtime import compiled_denoiser, tvm
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.tensorfile import aligned, aligned_empty
from mpq_compiler.targets import table as targets
from tests.harness import once, packed

TARGETS = ("x86-64-avx512vnni", "x86-64-avx2")
MODELS = (
    (packed.BUNDLED, "int8"),
    ("unet2d", "int3"),
    ("unet2d-class", "int2+b"),
    ("sd15", "int8"),
    ("pixart", "int4"),
    ("unet2d-17x23", "int8"),
    ("dit", "int8"),
    ("sd3", "int4"),
    ("flux", "int8"),
    ("hunyuan", "int8"),
    ("sana", "int8"),
    ("pixart-size", "int8"),
    ("sd15", "int4,dynamic=true"),
    ("pixart", "int4g64,dynamic=true"),
)
BATCHES = (1, 4)
EXACT_STEPS = {"add", "sub", "rsub", "mul", "div", "rdiv", "neg", "square", "cast", "quantize", "rotate", "ne", "where"}
EXACT_STEPS |= {"maximum", "minimum", "binade"}
"""Operations that IEEE 754 defines to the last bit, and the quantizer."""


def runnable(name: str) -> targets.Target:
    target = targets.resolve(name)
    if lacking := targets.missing_features(target):
        pytest.skip(f"this machine lacks {', '.join(lacking)}")
    return target


def here() -> list[str]:
    """The targets that this machine runs."""
    found = [name for name in TARGETS if not targets.missing_features(targets.resolve(name))]
    return found or pytest.skip("this machine runs no x86 target")


@functools.cache
def compiled(name: str, weights: str, target: str) -> tuple[bundle.Artifact, Lowered]:
    """The artifact of a packed program and the plan it was built from."""
    case, row = packed.program(name, weights), runnable(target)

    def make(path: Path) -> None:
        built = build(case.program, row, BATCHES, jobs=2, cache=packed.kernel_cache())
        assert built.payload_bytes == costs.stored_bytes(case.planned)
        packed.write(path, case.program, row, built)

    path = once.made(f"{name}-{weights}-{target}.mpq", make)
    return bundle.read(path), lower(case.program, BATCHES)


@functools.cache
def executed(name: str, weights: str, target: str) -> torch.Tensor:
    """The artifact's outputs for the 64 inputs."""
    inputs = {key: value.numpy() for key, value in packed.program(name, weights).inputs.items()}
    return torch.from_numpy(compiled_denoiser.load(compiled(name, weights, target)[0].path, threads=1).run(inputs))


# ------------------------------------------------------------------------------------- (a) node by node


class Kernels:
    """Calls single kernels of an artifact."""

    def __init__(self, made: bundle.Artifact, lowered: Lowered, target: str) -> None:
        machine = tvm.VirtualMachine(made, threads=1)
        self.prepared = dict(zip(lowered.prepared, (np.from_dlpack(t) for t in machine._prepared), strict=True))
        self.ffi = tvm.load()
        self.library = self.ffi.load_module(str(made.file(bundle.KERNELS)))  # the machine; kernels lie beneath
        self.target = targets.resolve(target)

    def __call__(self, kernel: Kernel, operands: dict[str, np.ndarray], batch: int) -> dict[str, np.ndarray]:
        """The kernel's outputs by the names of its arguments."""
        inputs, outputs = templates.arguments(kernel, self.target)

        def sized(shape):
            return tuple(batch if extent == "B" else extent for extent in shape)

        arrays = [aligned(np.ascontiguousarray(operands[a.name]).reshape(sized(a.shape)).copy()) for a in inputs]
        results = {a.name: aligned_empty(sized(a.shape), np.dtype(a.dtype)) for a in outputs}
        function = self.library.get_function(kernel.name, query_imports=True)
        function(*(self.ffi.from_dlpack(array) for array in (*arrays, *results.values())))
        return results


def steps_of(kernel: Kernel) -> list[str]:
    """Names of the pointwise operations that a kernel computes."""
    fields = dict(kernel.problem.fields)
    holder = fields.get("epilogue", kernel.problem if kernel.template == "pointwise" else None)
    return [step.get("op") for step in holder.get("steps")] if holder else []


def is_exact(kernel: Kernel) -> bool:
    """Whether its result is defined to the bit: integers, moved elements, IEEE operations."""
    exact = ("gemm", "quantize", "hadamard", "movement", "pointwise")
    return kernel.template in exact and {*steps_of(kernel)} <= EXACT_STEPS


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "weights"), MODELS)
@pytest.mark.invariant("compiler-1")
def test_every_node_computes_what_the_reference_does(name, weights, target):
    case = packed.program(name, weights)
    kernels = Kernels(*compiled(name, weights, target), target)
    lowered = compiled(name, weights, target)[1]
    inputs, batch = packed.take(case.inputs, slice(4)), 4
    expected: dict[str, np.ndarray] = {}

    def watch(node, value):
        if isinstance(value, torch.Tensor):
            floats = value.float() if value.dtype == torch.bool else value  # kernels hold truth values as 1 and 0
            expected[node.name] = floats.numpy()

    run(case.program, inputs, watch=watch)
    known = {**kernels.prepared, **{key: value.numpy() for key, value in inputs.items()}}
    checked: Counter[str] = Counter()
    codes = differing = between = 0
    for call in lowered.functions[0].calls:
        forced = known | {key: expected[key] for key in expected.keys() - kernels.prepared.keys()}
        operands = {argument: forced[value] for argument, value in call.operands}
        results = kernels(call.kernel, operands, batch)
        for argument, value in call.results:
            known[value] = result = results[argument]
            made = value
            if call.into:
                value, result = written_part(call, value, result, expected)
            if value not in expected:
                between += "|" in made  # codes of what is upsampled next, the copied part of a concatenation
                continue  # the first of two kernels of a region: checked behind the second
            target_value = expected[value].reshape(result.shape)
            assert result.dtype == target_value.dtype, call
            checked[call.kernel.template] += 1
            if is_exact(call.kernel):
                assert np.array_equal(result, target_value), f"{call.node}: {call.kernel}"
            elif result.dtype == np.uint8:
                difference = np.abs(result.astype(int) - target_value)
                assert difference.max() <= 1, f"{call.node}: {call.kernel}"
                codes, differing = codes + difference.size, differing + int(difference.sum())
            else:
                error = np.abs(result - target_value).max() / np.abs(target_value).max()
                assert error <= 1e-5, f"{call.node}: {call.kernel}: {error}"
    assert differing <= max(1, 1e-5 * codes)  # over all nodes: one node has too few codes for such a share
    layers = ("float_gemm", "pointwise") if "activation_format=float" in weights else ("gemm", "quantize")
    assert all(checked[template] for template in ("norms", "attention", *layers))
    assert sum(checked.values()) + between >= len(lowered.functions[0].calls) - len(case.program.fallbacks)


def written_part(
    call: Call, value: str, buffer: np.ndarray, expected: dict[str, np.ndarray]
) -> tuple[str, np.ndarray]:
    """The node whose result a call has written to a part of a larger buffer, and that part."""
    source = value.split("|")[0]
    if source not in expected:
        return source, buffer
    _, offset, row = call.kernel.problem.get("into")
    fields = dict(call.kernel.problem.fields)
    width = fields.get("outputs") or fields["channels"]
    rows = expected[source][0].size // width
    return source, buffer[:, offset + np.arange(rows)[:, None] * row + np.arange(width)]


# ------------------------------------------------------------------------------------ (c), (d) end to end


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "weights"), MODELS)
def test_artifact_is_as_good_as_the_packed_program(name, weights, target):
    case = packed.program(name, weights)
    expected = case.denoiser(**case.inputs)
    packed_db = packed.sqnr_db(run(case.program, case.inputs), expected)
    artifact_db = packed.sqnr_db(executed(name, weights, target), expected)
    assert abs(artifact_db - packed_db) <= 0.1


@pytest.mark.parametrize("target", TARGETS)
def test_a_rewritten_program_is_as_good_as_the_packed_one(target, tmp_path):
    """Parts of channels under quantizers of their own, a stored token before the others."""
    case = packed.program("sd15", "int8", "split-shortcut,bos-split")
    machine = artifact_of(case.program, tmp_path, target)
    made = {node.target for node in case.program.graph.nodes}
    assert ops.prepend in made and aten.slice.Tensor in made
    inputs = packed.take(case.inputs, slice(16))
    result = torch.from_numpy(machine.run({key: value.numpy() for key, value in inputs.items()}))
    expected = case.denoiser(**inputs)
    agreement = packed.sqnr_db(result, expected) - packed.sqnr_db(run(case.program, inputs), expected)
    assert abs(agreement) <= 0.1


@pytest.mark.invariant("trdq-5")
def test_rotated_channels(tmp_path):
    """Quantized in the kernel that rotates, which may be a norm, by each CPU target to the same bits."""
    case = packed.program("unet2d-class", "int4", "rotate{rule=everywhere,rows=8}")
    inputs = packed.take(case.inputs, slice(16))
    expected = case.denoiser(**inputs)
    kernels = [call.kernel for call in lower(case.program, (1,)).functions[0].calls]
    made = [steps_of(k) for k in kernels if k.template == "hadamard" or dict(k.problem.fields).get("block")]
    assert len(made) > 20 and all(steps[-1] == "quantize" for steps in made)
    outputs = []
    for target in here():
        folder = tmp_path / target
        folder.mkdir()
        machine = artifact_of(case.program, folder, target)
        outputs.append(torch.from_numpy(machine.run({key: value.numpy() for key, value in inputs.items()})))
        agreement = packed.sqnr_db(outputs[-1], expected) - packed.sqnr_db(run(case.program, inputs), expected)
        assert abs(agreement) <= 0.1
    assert all(torch.equal(outputs[0], other) for other in outputs)


@pytest.mark.parametrize(("name", "weights"), MODELS)
@pytest.mark.invariant("compiler-1")
def test_cpu_targets_give_the_same_bits(name, weights):
    first, *others = (executed(name, weights, target) for target in TARGETS)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", ["unet2d-class", "pixart"])
@pytest.mark.invariant("compiler-5")
def test_a_batch_of_mixed_timesteps_equals_its_samples(name):
    weights = dict(MODELS)[name]
    case = packed.program(name, weights)
    assert case.inputs["timestep"].unique().numel() > 8
    machine = compiled_denoiser.load(compiled(name, weights, TARGETS[1])[0].path, threads=1)
    rows = [machine.run({k: v[i : i + 1].numpy() for k, v in case.inputs.items()}) for i in range(8)]
    assert np.array_equal(np.concatenate(rows), executed(name, weights, TARGETS[1])[:8].numpy())


@pytest.mark.invariant("compiler-4")
def test_other_time_groups_change_nothing(tmp_path):
    name, weights = "unet2d", "int3"
    case, (made, _) = packed.program(name, weights), compiled(name, weights, TARGETS[1])
    boundaries = case.program.facts[TIME_GROUPS]
    group = torch.bucketize(case.inputs["timestep"].float(), boundaries, right=True)
    used = int(group.mode().values)
    rows = (group == used).nonzero().flatten()
    assert len(boundaries) and 0 < len(rows) < 64
    changed = {}
    for key, array in made.tensors().items():
        array = np.array(array)
        if key.endswith((":scale", ":zero_point")) and array.shape == (len(boundaries) + 1,):
            others = np.arange(len(array)) != used
            array[others] = 7 if array.dtype == np.uint8 else array[others] * 3
        changed[key] = array
    drop = ("format", "format_version", "files", "weights", "artifact_sha256")
    manifest = {key: value for key, value in made.manifest.items() if key not in drop}
    bundle.write(tmp_path / "b.mpq", manifest, {bundle.KERNELS: made.file(bundle.KERNELS)}, changed)
    machine = compiled_denoiser.load(tmp_path / "b.mpq", threads=1)
    all_rows = machine.run({key: value.numpy() for key, value in case.inputs.items()})
    expected = executed(name, weights, TARGETS[1]).numpy()
    assert np.array_equal(all_rows[rows], expected[rows])
    assert not np.array_equal(all_rows, expected)


# ------------------------------------------------------------------------------------------- equal bytes


@pytest.mark.invariant("compiler-12")
def test_equal_bytes_whatever_jobs_and_folders(tmp_path):
    lowered = lower(packed.program("pixart", "int4").program, (1, 2))
    target = targets.resolve("aarch64-dotprod" if tvm_linker_missing("x86-64-avx2") else "x86-64-avx2")
    (tmp_path / "other").mkdir()
    first, reused, memory = compile_library(lowered, target, jobs=1, cache=tmp_path)
    second, _, _ = compile_library(lowered, target, jobs=2, cache=tmp_path / "other")
    third, all_reused, same_memory = compile_library(lowered, target, jobs=2, cache=tmp_path)
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest() == hashlib.sha256(third).digest()
    assert reused == 0 and all_reused == len(lowered.kernels())
    assert memory == same_memory, "what workspaces take is kept with the kernels"
    assert str(tmp_path).encode() not in first and str(Path.cwd()).encode() not in first


def tvm_linker_missing(name: str) -> bool:
    from mpq_compiler.backends.tvm.toolchain.linker import linker

    try:
        linker(targets.resolve(name))
    except UserError:
        return True
    return False


def test_functions_of_the_manifest():
    case = packed.program("unet2d-class", "int2+b")
    made, lowered = compiled("unet2d-class", "int2+b", TARGETS[1])
    functions = {f["name"]: f for f in made.manifest["functions"]}
    assert list(functions) == [f"denoise_b{b}" for b in BATCHES]
    inputs = {value["name"]: value for value in functions["denoise_b4"]["inputs"]}
    assert inputs["timestep"] == {"name": "timestep", "shape": [4], "dtype": "float32"}
    assert [spec.name for spec in case.program.inputs] == list(inputs)
    assert made.manifest["prepare"]["tensors"] == [value.name for value in lowered.stored]
    codes = [entry for entry in made.manifest["tensors"] if "bits" in entry]
    assert {entry["bits"] for entry in codes} == {3}  # int2 and a binary branch: a table of eight entries


def test_threads_change_no_bit():
    made, _ = compiled("unet2d", "int3", TARGETS[1])
    inputs = {key: value.numpy() for key, value in packed.program("unet2d", "int3").inputs.items()}
    two = [compiled_denoiser.load(made.path, threads=2) for _ in range(2)]
    expected = executed("unet2d", "int3", TARGETS[1]).numpy()
    assert np.array_equal(two[0].run(inputs), expected)
    with ThreadPoolExecutor(2) as callers:  # at once: a loop that finds the pool at work is run by its caller alone
        outputs = [*callers.map(lambda i: two[i % 2].run(inputs), range(8))]
    assert all(np.array_equal(output, expected) for output in outputs)


# ---------------------------------------------------------------------------------------------- refusals


def one_kernel(kernel: Kernel) -> Lowered:
    x, y = Value("x", ("B", 4), "float32"), Value("y", ("B", 4), "float32")
    return Lowered((), (), (), (Function((x,), (Call(kernel, (("x", "x"),), (("y", "y"),), "conv_7"),), y),))


GEMM = Kernel("gemm", record("problem.QuantMatmul", height=8, width=8, channels=64, outputs=64, groups=2))


def test_a_worker_that_llvm_ends_is_one_sentence(tmp_path):
    """x86-64-v4 has no VNNI: without the attribute LLVM cannot select vpdpbusd and aborts its process."""
    target = targets.resolve("x86-64-avx512vnni")
    options = {key: value for key, value in target.tvm.items() if key != "mattr"}
    with pytest.raises(UserError) as caught:
        compile_library(one_kernel(GEMM), dataclasses.replace(target, tvm=options), jobs=2, cache=tmp_path)
    sentence = str(caught.value)
    assert "conv_7" in sentence and "channels=64" in sentence and "x86-64-avx512vnni" in sentence
    assert "compiler aborted" in sentence and "\n" not in sentence
    assert not list((tmp_path / "kernels").iterdir())


def test_a_kernel_that_cannot_be_generated_is_one_sentence(tmp_path):
    kernel = Kernel("gemm", GEMM.problem.replace(bits=5))
    with pytest.raises(UserError, match=r"conv_7.*bits=5.*x86-64-avx2.*weights of 5 bits have no kernel") as caught:
        compile_library(one_kernel(kernel), targets.resolve("x86-64-avx2"), cache=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_worker_reads_no_modules_of_the_users_folder(tmp_path, monkeypatch):
    """A folder with a model may hold anything."""
    (tmp_path / "pickle.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(tmp_path)
    with Worker() as worker, pytest.raises(Failure, match="KeyError"):
        worker("nothing")


def test_worker_outlives_an_error():
    with Worker() as worker:
        with pytest.raises(Failure, match="5 bits"):
            worker("compile", Kernel("gemm", GEMM.problem.replace(bits=5)), targets.resolve("x86-64-avx2"), "x.o")
        with pytest.raises(Failure, match="KeyError"):
            worker("nothing")
        worker._process.kill()
        with pytest.raises(Crash, match="SIGKILL"):
            worker("nothing")


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written"):
        compile_library(one_kernel(GEMM), targets.resolve("x86-64-avx2"), cache=tmp_path / "file")


def test_a_full_disk_is_not_taken_for_a_kernel_that_fails(tmp_path, monkeypatch):
    """LLVM ends its process when an object cannot be written, as it does when it has no instruction."""
    target = targets.resolve("x86-64-avx512vnni")
    options = {key: value for key, value in target.tvm.items() if key != "mattr"}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="no space left in the folder for temporary files"):
        compile_library(one_kernel(GEMM), dataclasses.replace(target, tvm=options), cache=tmp_path)


def test_unknown_operators_are_named():
    program = packed.program("pixart", "int4").program.fork()
    node = next(n for n in program.graph.nodes if n.target is ops.quantize)
    with program.graph.inserting_before(node):
        new = program.graph.call_function(aten.cumsum.default, (node.args[0], 1))
    node.replace_input_with(node.args[0], new)
    with pytest.raises(UserError, match=rf"node '{new.name}' \(aten.cumsum\) cannot be compiled for a CPU: no kernel"):
        lower(program, (1,))


def test_quantized_attention_is_refused_by_name():
    program = packed.program("pixart", "int4,attention=8").program
    with pytest.raises(UserError, match=r"attn1_.* \(mpq::quant_attention\) .* the targets reference and onnx run it"):
        lower(program, (1,))


def test_more_elements_than_indices_count_are_refused():
    with pytest.raises(UserError, match=r"'.*' has \d+ elements at a batch of \d+, and kernels count to 2147483647"):
        lower(packed.program("pixart", "int4").program, (1, 2**26))


@pytest.mark.parametrize("batches", [(), (0,), (1, -1)])
def test_batches_are_positive(batches):
    with pytest.raises(UserError, match="cannot be compiled"):
        lower(packed.program("pixart", "int4").program, batches)


# ----------------------------------------------------------------------- programs that no recipe makes yet


def artifact_of(program, folder: Path, target: str) -> compiled_denoiser.CompiledDenoiser:
    row = runnable(target)
    program.facts.setdefault(PARAMETERS, 1)
    built = build(program, row, (1, 3), cache=packed.kernel_cache())
    return compiled_denoiser.load(packed.write(folder / "a.mpq", program, row, built), threads=1)


@pytest.mark.parametrize("target", TARGETS)
def test_a_program_in_float_runs_whole(target, tmp_path):
    """Float layers, alone and with epilogues: what a plan leaves unquantized."""
    case = packed.program(packed.BUNDLED)
    passes = parser.parse("trace,layout")
    start = Program(fx.Graph(), TensorStore(), (), Stage.FLOAT)
    program, _ = manager.run_pipeline(passes, start, session.Session(case.denoiser))
    program = FuseEpilogues().run(program, session.Session())
    machine = artifact_of(program, tmp_path, target)
    inputs = packed.take(case.inputs, slice(4))
    result = machine.run({key: value.numpy() for key, value in inputs.items()})
    expected = run(program, inputs).numpy()
    assert np.abs(result - expected).max() <= 1e-4 * np.abs(expected).max()
    assert all("float32" in reason for reason in program.fallbacks.values()) and program.fallbacks


def by_hand(build_graph) -> Program:
    """A program on x f32 [B, 5, 7] and timestep whose graph `build_graph(graph, store, x, group)` completes."""
    graph, store = fx.Graph(), TensorStore()
    x, timestep = graph.placeholder("x"), graph.placeholder("timestep")
    boundaries = graph.get_attr(store.add("time_groups.boundaries", torch.tensor([300.0, 700.0])))
    group = graph.call_function(ops.time_group, (timestep, boundaries))
    graph.output(build_graph(graph, store, x, group))
    inputs = (InputSpec("x", ("B", 5, 7), torch.float32), InputSpec("timestep", ("B",), torch.int64))
    return Program(graph, store, inputs, Stage.PACKED)


def check_by_hand(program: Program, folder: Path, exact: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {"x": torch.randn(6, 5, 7, generator=generator), "timestep": torch.tensor([0, 999, 300, 299, 700, 512])}
    expected = run(program, inputs).numpy()
    for target in here():
        (folder / target).mkdir()
        result = artifact_of(program, folder / target, target).run({k: v.numpy() for k, v in inputs.items()})
        if exact:
            assert np.array_equal(result, expected)
        else:
            assert np.abs(result - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.invariant("qdiffusion-4")
def test_two_segments_with_offsets_and_tables(classes, tmp_path):
    """Two segments with scales of their own, offsets, row classes: all of the weight contract."""
    generator = torch.Generator().manual_seed(1)

    def table(*shape):
        return (torch.rand(shape, generator=generator) * 0.05 + 0.01).half()

    def build_graph(graph, store, x, group):
        def get(name, tensor):
            return graph.get_attr(store.add(name, tensor))

        def integers(high, *shape):
            return torch.randint(0, high, shape, generator=generator, dtype=torch.uint8)

        scales = [get(f"x{j}:scale", table(3)) for j in (0, 1)]
        zeros = [get(f"x{j}:zero_point", integers(256, 3)) for j in (0, 1)]
        halves = [
            graph.call_function(
                ops.quantize, (graph.call_function(aten.slice.Tensor, (x, 2, a, b)), s, z, group, 8)
            )
            for (a, b), s, z in zip(((0, 3), (3, 7)), scales, zeros, strict=True)
        ]
        codes = graph.call_function(aten.cat.default, (halves, -1))
        lut = get("w:lut", torch.randint(-127, 128, (classes, 16), generator=generator, dtype=torch.int8))
        row_class = get("w:row_class", integers(2, 3)) if classes > 1 else None
        weight = (get("w:codes", integers(16, 37, 7)), get("w:scale", table(37, 2)), get("w:offset", table(37)))
        arguments = (codes, group, *weight, lut, row_class, scales, zeros, get("w:bias", table(37)), [3, 4])
        return graph.call_function(ops.quant_linear, arguments)

    check_by_hand(by_hand(build_graph), tmp_path, exact=True)


def test_pointwise_movement_and_shapes(tmp_path):
    def build_graph(graph, store, x, group):
        def call(target, *args, **kwargs):
            return graph.call_function(target, args, kwargs)

        rows = call(aten.reshape.default, x, [-1, 7])  # 5 rows a sample
        first, second = (call(operator.getitem, call(aten.split.Tensor, rows, 4, -1), i) for i in (0, 1))
        padded = call(aten.pad.default, second, [1, 0], "constant", 2.0)
        y = call(aten.add.Tensor, first, padded, alpha=2)
        y = call(aten.maximum.default, y, call(aten.abs.default, call(aten.rsub.Scalar, y, 1.0)))
        y = call(aten.div.Tensor, y, call(aten.pow.Tensor_Scalar, call(aten.exp.default, y), 0.5))
        y = call(aten.reshape.default, y, [-1, 5, 4])
        y = call(aten.permute.default, y, [0, 2, 1])
        one = call(aten.select.int, y, 1, -1)
        wide = call(aten.expand.default, call(aten.unsqueeze.default, one, 1), [-1, 3, -1])
        bias = graph.get_attr(store.add("bias", torch.arange(7.0).half()[:, None] * torch.ones(5).half()))
        return call(aten.sub.Tensor, call(aten.cat.default, [y, wide], 1), bias)

    check_by_hand(by_hand(build_graph), tmp_path, exact=False)


def test_products_means_and_masks(tmp_path):
    def build_graph(graph, store, x, group):
        def call(target, *args, **kwargs):
            return graph.call_function(target, args, kwargs)

        def constant(name, tensor):
            return graph.get_attr(store.add(f"constant.{name}", tensor))

        def attend(mask):
            return call(ops.attention, x, x, x, 1, None, mask)

        later = constant("later", torch.full((5, 5), -torch.inf).triu(1))
        table = constant("table", torch.linspace(-1, 1, 28).reshape(4, 7))
        across = call(aten.matmul.default, x, call(aten.permute.default, x, [0, 2, 1]))  # [B, 5, 5]
        positive = call(aten.gt.Scalar, call(aten.select.int, x, 2, 0), 0.0)  # bool [B, 5]
        additive = call(aten.where.Scalar, positive, 0.0, -1e30)
        row = call(aten.slice.Tensor, table, 0, 0, 1)
        kept = call(aten.where.self, call(aten.unsqueeze.default, positive, 2), x, row)
        results = [
            call(aten.einsum.default, "bkm,bkn->bmn", [x, x]),
            call(aten.einsum.default, "bmk,nk->bnm", [x, table]),
            call(aten.einsum.default, "bkm,bkm->bm", [x, x]),
            call(aten.bmm.default, across, x),
            call(aten.mean.dim, x, [1]),
            call(aten.mean.dim, x, [-1], True),
            call(ops.rms_norm, x, None, 1e-6),
            call(ops.prepend, x, constant("token", torch.arange(7.0))),
            kept,
            call(aten.to.dtype, positive, torch.float32),
            attend(call(aten.reshape.default, additive, [-1, 1, 1, 5])),
            attend(call(aten.reshape.default, across, [-1, 1, 5, 5])),
            attend(later),
        ]
        sizes = [49, 20, 7, 35, 7, 5, 35, 42, 35, 5, 35, 35, 35]
        flat = [call(aten.reshape.default, y, [-1, size]) for y, size in zip(results, sizes, strict=True)]
        return call(aten.cat.default, flat, 1)

    check_by_hand(by_hand(build_graph), tmp_path, exact=False)


def test_products_that_are_none_are_refused():
    def built(equation):
        return by_hand(lambda graph, store, x, group: graph.call_function(aten.einsum.default, (equation, [x, x])))

    for equation in ("bkm,bkm->b", "bkm,bnm->bk", "akm,bkm->abk"):
        with pytest.raises(UserError, match=r"aten\.einsum.*(no product|batch outermost)"):
            lower(built(equation), (1,))


def test_equal_calls_on_other_shapes_keep_their_own(tmp_path):
    """A norm of two reshapes of one tensor is one kernel call, and two values."""

    def build_graph(graph, store, x, group):
        call = graph.call_function
        both = call(aten.cat.default, ([x, call(aten.add.Tensor, (x, 1.0))], 1))

        def turned(rows, columns):
            y = call(aten.reshape.default, (both, [-1, rows, columns, 7]))
            y = call(aten.layer_norm.default, (y, [7], None, None, 1e-5, False))
            return call(aten.reshape.default, (call(aten.permute.default, (y, [0, 2, 1, 3])), [-1, 70]))

        return call(aten.add.Tensor, (turned(2, 5), turned(5, 2)))

    check_by_hand(by_hand(build_graph), tmp_path, exact=False)


def test_an_empty_part_of_a_concatenation_is_left_out(tmp_path):
    def build_graph(graph, store, x, group):
        none = graph.call_function(aten.slice.Tensor, (x, 2, 3, 3))
        return graph.call_function(aten.cat.default, ([none, x, x], 2))

    check_by_hand(by_hand(build_graph), tmp_path, exact=True)


@pytest.mark.parametrize(
    ("build_graph", "reason"),
    [
        (lambda call, x: call(aten.select.int, (x, 0, 0)), "it takes a part of the batch"),
        (lambda call, x: call(aten.slice.Tensor, (x, 0, 0, 1)), "it takes a part of the batch"),
        (
            lambda call, x: call(ops.group_norm, (call(aten.reshape.default, (x, [-1, 1, 7])), 7, None, None, 1e-5)),
            "a sample has several rows, each with statistics of its own",
        ),
        (
            lambda call, x: call(ops.attention, (x, x, call(aten.slice.Tensor, (x, 2, 0, 1)), 1)),
            "its values have other heads than its queries and keys",
        ),
    ],
)
def test_what_no_kernel_computes_is_refused(build_graph, reason):
    def built(graph, store, x, group):
        return build_graph(graph.call_function, x)

    with pytest.raises(UserError, match=f"cannot be compiled for a CPU: {reason}"):
        lower(by_hand(built), (1,))
