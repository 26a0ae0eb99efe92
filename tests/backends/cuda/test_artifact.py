"""Artifacts for GPUs: compiled without one, run on the emulator (or with `--gpu`) through TVM's own CUDA runtime."""

from __future__ import annotations

import functools
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tvm")
from mpq_compiler.artifact import bundle
from mpq_compiler.backends.tvm import lowering
from mpq_compiler.backends.tvm.build import build
from mpq_compiler.backends.tvm.lowering import lower
from mpq_compiler.backends.tvm.plan import stages
from mpq_compiler.backends.tvm.plan.weight_only import keep_codes
from mpq_compiler.backends.tvm.toolchain import machine_code
from mpq_compiler.cli import mpqc as cli_mpqc
from mpq_compiler.ir.findings import STORED_HALVES
from mpq_compiler.ir.interpreter import run
from mpq_compiler.targets import table as targets
from mpq_compiler.targets.numerics import BF16, BOUNDS
from tests.harness import packed, programs
from tests.harness.cuda import emulator, kernels, nvcc, silicon
from tests.harness.cuda.kernels import cuobjdump
from tests.harness.float_kernels import error

pytestmark = pytest.mark.filterwarnings("error:NVIDIA's assembler complains")
MODELS = (
    (packed.BUNDLED, "int4", "cuda-sm90"),
    ("sd15", "int2+b", "cuda-sm90"),
    ("pixart", "int4g64,dynamic=true", "cuda-sm80"),
)
PIPELINE = (
    "trace,layout,calibrate{samples=4,steps=2},time-groups,bit-allocation{uniform=int4},numerics{mode=portable},"
    "insert-fake-quant,residual-branch,round-weights,fold-fake-quant,fuse-epilogues"
)
RUN = """
import ctypes, pickle, sys
from mpq_compiler.runtime import compiled_denoiser as runtime
artifact = runtime.load(sys.argv[1])
assert artifact.to("cuda") is artifact
pickle.dump([artifact.run(inputs) for inputs in pickle.load(sys.stdin.buffer)], sys.stdout.buffer)
driver = ctypes.CDLL("libcudart.so.13")  # whose launches TVM's runtime takes, the emulator's libcuda has the same;
# with CUDA 12 that is the artifact's cudart.so, and what it needs
if hasattr(driver, "cuEmulatedLaunches"):
    print(driver.cuEmulatedLaunches(), driver.cuEmulatedGraphs(), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The environment in which a compiler makes what runs here, quickly: the emulator's, NVIDIA's for a GPU."""
    kernels.needs()
    return {} if silicon.asked() else {"CUDA_HOME": str(nvcc.install(tmp_path_factory.mktemp("cuda")))}


def execute(
    path: Path, calls: Sequence[dict[str, np.ndarray]], release: int = 13, **environment: str
) -> tuple[list[np.ndarray], tuple[int, int] | None]:
    """What calls of an artifact yield; of the emulator how many kernels were launched by themselves, and graphs."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path)],
        input=pickle.dumps(calls),
        capture_output=True,
        env=kernels.environment(release, **environment),
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    if silicon.asked():
        return pickle.loads(done.stdout), None
    launches, graphs = done.stderr.split()[-2:]
    return pickle.loads(done.stdout), (int(launches), int(graphs))


def mpqc(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mpq_compiler.cli.mpqc", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize(("name", "weights", "target"), MODELS)
def test_artifact_is_as_good_as_the_packed_program(name, weights, target, home, monkeypatch, tmp_path):
    for variable, value in home.items():
        monkeypatch.setenv(variable, value)
    case = packed.program(name, weights)
    target = silicon.target() if silicon.asked() else targets.resolve(target)
    built = build(case.program, target, (1, 4), jobs=2, cache=tmp_path)
    path = packed.write(tmp_path / "model.mpq", case.program, target, built)
    inputs = packed.take(case.inputs, slice(8))
    expected = case.denoiser(**inputs)
    packed_db = packed.sqnr_db(run(case.program, inputs), expected)
    level = "86" if target.levels == [80] else "90"  # an RTX 30 runs the code of an A100
    (found,), _ = execute(path, [_arrays(inputs)], MPQ_EMULATED_SM=level)
    artifact_db = packed.sqnr_db(torch.from_numpy(found), expected)
    assert abs(artifact_db - packed_db) <= 0.1


def test_gates_integers_and_siblings_change_no_bit(home, monkeypatch, tmp_path):
    """Products that compute gates, decode integers by shifts, or are one launch, against those that do nothing so."""
    for variable, value in home.items():
        monkeypatch.setenv(variable, value)
    case, target = packed.program("sd15", "int4"), silicon.target() if silicon.asked() else targets.resolve("cuda-sm90")
    found, inputs = [], packed.take(case.inputs, slice(2))
    for name, left_out in (("whole", ()), ("less", (stages.FuseGates, stages.DecodeByShifts, stages.FuseSiblings))):
        own = [stage for stage in lowering.of_target(target) if not isinstance(stage, left_out)]
        with monkeypatch.context() as patch:
            patch.setattr(lowering, "of_target", lambda target, own=own: own)
            built = build(case.program, target, (2,), jobs=2, cache=tmp_path)
        path = packed.write(tmp_path / f"{name}.mpq", case.program, target, built)
        found += execute(path, [_arrays(inputs)], MPQ_EMULATED_SM="90")[0]
    np.testing.assert_array_equal(found[0].view(np.uint32), found[1].view(np.uint32))


def test_halves_between_kernels_cost_little(home, monkeypatch, tmp_path):
    """As near to the float model as without: codes behind them may fall to the other side, which is no more noise."""
    for variable, value in home.items():
        monkeypatch.setenv(variable, value)
    case, target = packed.program("sd15", "int4"), silicon.target() if silicon.asked() else targets.resolve("cuda-sm90")
    inputs, found = packed.take(case.inputs, slice(8)), []
    for stored in (False, True):
        program = case.program.fork()
        program.facts[STORED_HALVES] = stored
        built = build(program, target, (2,), jobs=2, cache=tmp_path)
        path = packed.write(tmp_path / f"{stored}.mpq", program, target, built)
        found += execute(path, [_arrays(inputs)], MPQ_EMULATED_SM="90")[0]
    floats, halves = (packed.sqnr_db(torch.from_numpy(y), case.denoiser(**inputs)) for y in found)
    assert not np.array_equal(*found) and abs(halves - floats) <= 0.1, (halves, floats)


def _arrays(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in inputs.items()}


def test_layers_in_bfloat16(tmp_path):
    """Packed at load; on tensor cores of every architecture, no register spilled; no instruction asked of the CPU.

    A weight in codes stays in codes.
    """
    program, given = programs.bfloat16_layers()
    target = targets.resolve("cuda")
    built = build(program, target, (2,), cache=tmp_path)
    assert not built.features
    products = [m for m in emulator.modules(tmp_path) if "f32_bf16_bf16_f32" in _source(m)]
    assert len(products) == 4
    templates = {each.template for each in keep_codes(lower(program, (2,), hoisted=False)).kernels()}
    assert {"pack", "float_gemm", "pack_codes", "weight_only"} <= templates and "dequantize" not in templates
    for module in products:
        code = tmp_path / "kernel.fatbin"
        code.write_bytes(emulator.code_of(module))
        assert_no_spills(code)
        assert cuobjdump("-sass", code).count("HMMA.16816.F32.BF16") >= 4 * 4
    path = packed.write(tmp_path / "model.mpq", program, target, built)
    (y,), _ = execute(path, [{"x": given.numpy()}], **known_to_the_driver(tmp_path, tmp_path, "80"))
    assert error(y, run(program, {"x": given}).numpy()) <= BOUNDS[BF16]


def known_to_the_driver(cache: Path, folder: Path, level: str) -> dict[str, str]:
    """What an environment must say so that the machine code in the cache of a compilation runs."""
    kernels.needs()
    if silicon.asked():
        return {}
    emulator.emulate(cache, folder)
    return {"MPQ_EMULATED": str(folder), "MPQ_EMULATED_SM": level}


def test_a_jetson_is_launched_by_its_own_processor(tmp_path):
    """A few layers are enough: every kernel is launched, and every library linked, in the same way."""
    program, _ = programs.bfloat16_layers()
    header = build(program, targets.resolve("cuda-sm87"), (2,), cache=tmp_path).files[bundle.KERNELS][:20]
    assert header[:4] == b"\x7fELF" and header[18] == 183  # AArch64


@pytest.fixture(scope="module")
def for_all(tmp_path_factory):
    """By name, (artifact, cache) of a bundled denoiser, compiled by NVIDIA's compiler for all architectures."""

    @functools.cache
    def compiled(name: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        options = ("--target", "cuda", "--pipeline", PIPELINE, "--cache", folder, "--jobs", 2)
        done = mpqc("compile", name, "-o", folder / "model.mpq", *options)
        assert done.returncode == 0, done.stderr
        return folder / "model.mpq", folder

    return compiled


@pytest.mark.parametrize("name", ["fashion-unet", "fashion-dit", "fashion-text"])
def test_machine_code_for_all_architectures(for_all, name, tmp_path):
    """Products are on integer tensor cores, four instructions of them at least, and no kernel of them spills."""
    products = 0
    for module in emulator.modules(for_all(name)[1]):
        if "mma_int_sync" not in _source(module):
            continue
        products += 1
        code = tmp_path / "kernel.fatbin"
        code.write_bytes(emulator.code_of(module))
        assert_no_spills(code)
        if products == 1:
            assert cuobjdump("-sass", code).count("IMMA.16832.U8.S8") >= 4 * 4
    assert products > 5


def assert_no_spills(code: Path) -> None:
    """On none of the architectures, all of which there is code for."""
    used = cuobjdump("-res-usage", code)
    assert {int(level) for level in re.findall(r"sm_(\d+)", used)} == {80, 87, 89, 90}
    assert {int(n) for n in re.findall(r"LOCAL:(\d+)", used)} == {0}, used


def _source(module: Path) -> str:
    """The CUDA of a kernel in the cache."""
    return module.with_suffix(machine_code.SOURCE).read_text()


@pytest.fixture(scope="module")
def unet(for_all, tmp_path_factory):
    """(artifact, what the driver has to know to run it); of one denoiser, for kernels run in other tests."""
    path, cache = for_all("fashion-unet")
    return path, known_to_the_driver(cache, tmp_path_factory.mktemp("emulated"), "90")


def test_an_artifact_of_fatbins_runs(unet):
    """From its second call on as a graph, whatever the batch sizes in between."""
    path, options = unet
    case = packed.program(packed.BUNDLED, "int4")
    parts = [packed.take(case.inputs, rows) for rows in (slice(1), slice(2, 4), slice(4, 5))]
    (first, two, third), several = execute(path, [_arrays(inputs) for inputs in parts], **options)
    (alone,), one = execute(path, [_arrays(parts[2])], **options)
    np.testing.assert_array_equal(third, alone)
    if several is not None and one is not None:
        (launches, graphs), (launches_alone, none) = several, one
        assert (graphs, none) == (1, 0)
        assert launches - launches_alone < launches_alone / 2  # a call of two, and what the graph leaves out
    for found, inputs in zip((first, two, third), parts, strict=True):
        assert packed.sqnr_db(torch.from_numpy(found), case.denoiser(**inputs)) > 10


def test_its_time_is_that_of_the_wall(unet):
    path, options = unet
    code = (
        "import sys; from mpq_compiler.bench.run import bench\n"
        "for more in ({}, {'kernels': True}, {'against': ['onnxruntime-int8']}):\n"
        "    try: print(bench([sys.argv[1]], rounds=1, memory=False, **more)['clock'])\n"
        "    except Exception as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=kernels.environment(**options))
    clock, profiled, against = done.stdout.splitlines()
    assert clock == "wall"
    assert "launched as one graph" in profiled and "leave against out" in against


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"MPQ_EMULATED_DEVICES": "0"}, r"it lacks an NVIDIA GPU that runs sm_80"),
        ({"MPQ_EMULATED_SM": "75"}, r"an NVIDIA GPU that runs sm_80 or sm_87 or sm_89 or sm_90 \(it has sm_75\)"),
        ({"MPQ_EMULATED_DRIVER": "12060"}, r"driver is of CUDA 12\.6, and .* needs 13\.0 or later: .* cuda12"),
        ({"MPQ_EMULATED_MEGABYTES": "2"}, r"MB of the GPU's memory, and emulated has 2 MB"),
        ({"MPQ_EMULATED_HELD_MEGABYTES": "8190"}, r"MB of the GPU's memory, and 2 MB of emulated are free: end what"),
    ],
)
def test_a_gpu_that_does_not_run_it(unet, variables, says):
    emulator.needs()
    code = "import sys; from mpq_compiler.runtime import compiled_denoiser as runtime; runtime.load(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(unet[0])],
        capture_output=True,
        text=True,
        env=emulator.environment(**variables),
    )
    assert re.search(f"UserError: .*{says}", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--tune",), "leave it out"),
        (("--emit", "c"), "kernels for CPUs"),
    ],
)
def test_what_a_gpu_cannot_be_given(options, says, tmp_path, capsys):
    assert cli_mpqc.main([*map(str, compiling(tmp_path)), *options]) == 1
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "x.mpq").exists()


def test_without_a_compiler(tmp_path):
    done = mpqc(*compiling(tmp_path), PATH="/usr/bin:/bin", PYTHONPATH=without_wheels(tmp_path))
    assert done.returncode == 1 and re.search(r"nvcc is not installed.*mpq-compiler\[cuda\]", done.stderr), done.stderr
    assert not (tmp_path / "x.mpq").exists()


def compiling(folder: Path) -> tuple[object, ...]:
    """A command for a GPU."""
    return "compile", "fashion-unet", "-o", folder / "x.mpq", "--target", "cuda", "--pipeline", PIPELINE


def without_wheels(folder: Path) -> str:
    """A folder for PYTHONPATH in which NVIDIA's wheels are none."""
    (folder / "nvidia").mkdir()
    (folder / "nvidia" / "__init__.py").write_text("")
    return str(folder)
