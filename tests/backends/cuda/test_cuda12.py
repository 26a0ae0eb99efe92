"""For drivers of CUDA 12: NVRTC's machine code, and TVM's runtime on the runtime library of CUDA 12."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")
import tvm

from mpq_compiler.artifact.bundle import CUDART, KERNELS
from mpq_compiler.backends.tvm.compile.link import compile_cudart
from mpq_compiler.backends.tvm.toolchain import machine_code, nvrtc
from mpq_compiler.targets import nvidia
from mpq_compiler.targets import table as targets
from tests.backends.cuda.test_artifact import PIPELINE, execute, mpqc, without_wheels
from tests.harness import packed
from tests.harness.cuda import emulator
from tests.harness.cuda.kernels import cuobjdump

pytestmark = pytest.mark.skipif(
    nvidia.from_wheels("cuda_nvrtc/lib/libnvrtc.so.12") is None, reason="NVRTC of CUDA 12.6 is not installed"
)
AARCH64 = 183
CLASSES = {"char": ctypes.c_char, "cudaUUID_t": ctypes.c_char * 16, "size_t": ctypes.c_size_t, "int": ctypes.c_int}


def compiled(model: str, target: str, numerics: str, folder: Path) -> tuple[Path, Path]:
    """(artifact, cache) of a bundled denoiser."""
    pipeline = PIPELINE.replace("portable", numerics)
    options = ("--target", target, "--pipeline", pipeline, "--cache", folder, "--jobs", 2)
    done = mpqc("compile", model, "-o", folder / "model.mpq", *options)
    assert done.returncode == 0, done.stderr
    return folder / "model.mpq", folder


@pytest.fixture(scope="module")
def jetson(tmp_path_factory):
    return compiled("fashion-dit", "cuda12-sm87", "fast", tmp_path_factory.mktemp("jetson"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    return compiled("fashion-unet", "cuda12-sm80", "portable", tmp_path_factory.mktemp("server"))


def test_every_kernel_is_machine_code_of_cuda_12_for_the_jetson(jetson, tmp_path):
    """And as good as nvcc's: on tensor cores, no register spilled."""
    assert len(emulator.modules(jetson[1])) > 20
    integers = floats = 0
    for module in emulator.modules(jetson[1]):
        code = tmp_path / "kernel.cubin"
        code.write_bytes(data := emulator.code_of(module))
        assert (data[7], data[8], data[48]) == (0x33, 7, 87)  # EI_OSABI, EI_ABIVERSION; of e_flags the level
        source = module.with_suffix(machine_code.SOURCE).read_text()
        if "mma" in source:
            used = cuobjdump("-res-usage", code)
            assert {int(n) for n in re.findall(r"LOCAL:(\d+)", used)} == {0}, used
            sass = cuobjdump("-sass", code)
            integers += sass.count("IMMA.16832.U8.S8") * ("mma_int_sync" in source)
            floats += sass.count("HMMA.16816.F32.BF16") * ("f32_bf16_bf16_f32" in source)
    assert integers >= 16 and floats >= 16


def test_what_goes_to_the_jetson(jetson):
    path = jetson[0]
    for name in (KERNELS, CUDART):
        assert int.from_bytes((path / name).read_bytes()[18:20], "little") == AARCH64
    stated = json.loads((path / "manifest.json").read_text())["target"]
    assert (stated["name"], stated["cuda"], stated["features"]) == ("cuda12-sm87", 12060, ["sm_87"])


def test_the_same_bytes_again(server, tmp_path):
    """Of machine code and of the library that stands for CUDA 13's, wherever they are made."""
    module = min(emulator.modules(server[1]), key=lambda path: path.stat().st_size)
    assert nvrtc.cubin(module.with_suffix(machine_code.SOURCE).read_text(), "80") == emulator.code_of(module)
    compile_cudart(targets.resolve("cuda12-sm80"), tmp_path / "other.so")
    assert (tmp_path / "other.so").read_bytes() == (server[0] / CUDART).read_bytes()


def test_tvms_runtime_runs_on_cuda_12_alone(server, tmp_path):
    """With the same bits as on CUDA 13, graphs included."""
    emulator.needs()
    emulator.emulate(server[1], tmp_path)
    case = packed.program(packed.BUNDLED, "int4")
    calls = [{name: value[rows].numpy() for name, value in case.inputs.items()} for rows in (slice(1), slice(4, 5))]
    options = {"MPQ_EMULATED": str(tmp_path), "MPQ_EMULATED_SM": "86"}
    old, counted = execute(server[0], calls, 12, **options)
    new, expected = execute(server[0], calls, 13, **options)
    assert counted == expected and counted[1] == 1
    for a, b, inputs in zip(old, new, calls, strict=True):
        np.testing.assert_array_equal(a, b)
        reference = case.denoiser(**{name: packed.torch.from_numpy(value) for name, value in inputs.items()})
        assert packed.sqnr_db(packed.torch.from_numpy(a), reference) > 10


@pytest.mark.parametrize(
    ("release", "variables", "says"),
    [
        (12, {"MPQ_EMULATED_DRIVER": "12020"}, r"driver is of CUDA 12\.2, and .* needs 12\.6 or later"),
        (13, {"MPQ_EMULATED_DRIVER": "12060"}, r"libcudart\.so\.12.*pip install nvidia-cuda-runtime-cu12"),
    ],
)
def test_what_the_device_lacks(release, variables, says, server, tmp_path):
    emulator.needs()
    path = os.pathsep.join([without_wheels(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = emulator.environment(release, MPQ_EMULATED_SM="80", PYTHONPATH=path, **variables)
    code = "import sys; from mpq_compiler.runtime import compiled_denoiser as runtime; runtime.load(sys.argv[1])"
    command = [sys.executable, "-c", code, str(server[0])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert re.search(f"UserError: .*{says}", done.stderr), done.stderr


def test_no_compiler(tmp_path):
    options = ("--target", "cuda12-sm87", "--pipeline", PIPELINE)
    done = mpqc("compile", "fashion-unet", "-o", tmp_path / "x.mpq", *options, PYTHONPATH=without_wheels(tmp_path))
    assert done.returncode == 1 and "pip install 'mpq-compiler[cuda12]'" in done.stderr, done.stderr


def _symbols(library: Path, option: str) -> list[str]:
    """The names that a library defines, or lacks."""
    command = ["nm", "-D", "--with-symbol-versions", option, str(library)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in said.splitlines()]


def runtime(arch: str, folder: Path) -> Path:
    """TVM's runtime for CUDA, of its wheel for an architecture."""
    place = "tvm/lib/libtvm_runtime_cuda.so"
    if arch == "x86_64":
        return Path(tvm.__file__).parents[1] / place
    wheels = sorted(Path(os.environ.get("MPQ_TEST_WHEELS", folder)).glob(f"apache_tvm-*{arch}.whl"))
    if not wheels:
        pytest.skip(f"MPQ_TEST_WHEELS names no folder with TVM's wheel for {arch}")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        return Path(wheel.extract(place, folder))


@pytest.mark.parametrize(("arch", "target"), [("x86_64", "cuda12-sm80"), ("aarch64", "cuda12-sm87")])
def test_all_that_tvms_runtime_calls_is_there(arch, target, tmp_path):
    library = runtime(arch, tmp_path)
    compile_cudart(targets.resolve(target), tmp_path / CUDART)
    called = {name for name in _symbols(library, "--undefined-only") if name.startswith("cuda")}
    assert len(called) > 20
    assert called == {name.replace("@@", "@") for name in _symbols(tmp_path / CUDART, "--defined-only") if "@@" in name}
    own = {name.replace("@@", "@") for name in _symbols(_nvidia("cuda_runtime/lib/libcudart.so.12"), "--defined-only")}
    assert {name for name in _symbols(tmp_path / CUDART, "--undefined-only") if name.startswith("cuda")} <= own


def test_functions_are_declared_alike_in_both_releases():
    """The driver's too, which TVM's runtime calls by itself."""
    called = {name.partition("@")[0] for name in _symbols(runtime("x86_64", Path()), "--undefined-only")}
    called = {name for name in called if re.match(r"cu[A-Z]|cuda[A-Z]", name)} - {"cudaGetDeviceProperties"}
    assert any(name.startswith("cuL") for name in called)
    headers = ("cuda.h", "cuda_runtime_api.h")
    old, new = (
        "".join(_nvidia(f"{place}/include/{name}").read_text().replace(" __dv(0)", "") for name in headers)
        for place in ("cuda_runtime", "cu13")
    )
    for name in called:
        before, after = (set(re.findall(rf"CUDA(?:RT)?API {name}(\([^;]*\));", text)) for text in (old, new))
        assert before and before == after, name


def _nvidia(place: str) -> Path:
    path = nvidia.from_wheels(place)
    assert path
    return path


def _properties(place: str) -> type[ctypes.Structure]:
    """struct cudaDeviceProp of a header."""
    text = _nvidia(f"{place}/include/driver_types.h").read_text()
    body = re.search(r"struct __device_builtin__ cudaDeviceProp\s*\{(.*?)\n\};", text, re.S).group(1)
    fields = []
    for kind, name, length in re.findall(r"^ +(?:unsigned )?(\w+) +(\w+)(?:\[(\d+)\])?;", body, re.M):
        fields.append((name, CLASSES[kind] * int(length) if length else CLASSES[kind]))
    return type(place, (ctypes.Structure,), {"_fields_": fields})


def test_properties_of_a_device_are_where_cuda_13_has_them(tmp_path):
    emulator.needs()
    compile_cudart(targets.resolve("cuda12-sm80"), tmp_path / CUDART)
    code = (
        "import ctypes, sys; found = ctypes.create_string_buffer(b'\\xff' * 1008, 1008)\n"
        "assert not ctypes.CDLL(sys.argv[1]).cudaGetDeviceProperties(found, 0); sys.stdout.buffer.write(found.raw)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / CUDART)]
    found = subprocess.run(command, capture_output=True, check=True, env=emulator.environment(12)).stdout
    old, new = _properties("cuda_runtime"), _properties("cu13")
    assert (ctypes.sizeof(old), ctypes.sizeof(new), len(found)) == (1032, 1008, 1008)
    given = np.arange(1032 // 4, dtype=np.uint32).tobytes()  # as the emulator's driver fills them in
    common = {name for name, _ in old._fields_} & {name for name, _ in new._fields_} - {"reserved"}
    assert len(common) > 70
    for name, _ in new._fields_:
        to = getattr(new, name)
        expected = bytes(to.size)
        if name in common:
            place = getattr(old, name)
            expected = given[place.offset : place.offset + place.size]
        assert found[to.offset : to.offset + to.size] == expected, name
