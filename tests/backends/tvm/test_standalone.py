"""The C program of an artifact: the machine's bits on every CPU target, its memory plan, what it refuses."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mpq_compiler.api import compile
from mpq_compiler.artifact import bundle, tvm_wheels
from mpq_compiler.backends.tvm import standalone
from mpq_compiler.backends.tvm.build import build
from mpq_compiler.driver import lower as driver_lower
from mpq_compiler.driver import options as driver_options
from mpq_compiler.evaluation import painter as evaluation_painter
from mpq_compiler.frontend import denoiser
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import table as targets
from tests.backends.tvm.test_emit import TARGETS, executed
from tests.harness import once, packed, programs, qemu, signatures

HOST = TARGETS[1]
CPUS = {
    **{"aarch64-neon": "cortex-a53", "aarch64-dotprod": "cortex-a76", "aarch64-i8mm": "max"},
    "aarch64-sme2": qemu.STREAMING,
}
"""The least that each target needs, of those that are emulated."""
STREAMING = ("unet2d-17x23", "int4", "aarch64-sme2")
CASES = (
    (packed.BUNDLED, "int8", HOST),
    (packed.BUNDLED, "int2+b", "aarch64-dotprod"),
    ("unet2d-17x23", "int3", "aarch64-i8mm"),
    STREAMING,
    ("unet2d-17x23", "ec2", "aarch64-dotprod"),
    ("sd15", "int4,dynamic=true", "aarch64-neon"),
)
BATCH = 4
MACHINES = (("sd15", "int4,dynamic=true", HOST), CASES[1])
"""Of programs with TVM's runtime: parts for texts and timesteps; another architecture, where its wheels are there."""
WHEELS = "MPQ_TEST_WHEELS"
"""The environment variable with a folder of TVM's wheels for AArch64 (docs/standalone.md)."""


@functools.cache
def program(name: str, weights: str, target: str, emit: str) -> Path:
    """The artifact with its C program, for "machine" with TVM's runtime too."""
    if target in CPUS and platform.machine() != "aarch64" and (absent := qemu.missing(target)):
        pytest.skip(absent)
    wheels = os.environ.get(WHEELS) if target in CPUS else None
    if emit == "machine" and target in CPUS and not wheels:
        pytest.skip(f"{WHEELS} names no folder with TVM's wheels for AArch64")
    case, row = packed.program(name, weights), targets.resolve(target)

    def make(path: Path) -> None:
        built = build(case.program, row, (1, BATCH), jobs=2, cache=packed.kernel_cache(), emit=emit)
        if emit == "machine":
            built.files.update(tvm_wheels.files(row, Path(wheels) if wheels else None))
        packed.write(path, case.program, row, built)

    return once.made(f"{name}-{weights}-{target}-{emit}.mpq", make)


def run(folder: Path, target: str, *options: str, cpu: str = "") -> subprocess.CompletedProcess[str]:
    command = [str(folder / bundle.PROGRAM), "--weights", str(folder / bundle.WEIGHTS), *options]
    if target in CPUS and platform.machine() != "aarch64":
        command = [*qemu.command(cpu or CPUS[target]), *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={"PATH": os.environ["PATH"]})


@pytest.fixture
def inputs(tmp_path):
    """Writes the first rows of a case's inputs to a file."""

    def make(name: str, weights: str) -> Path:
        rows = {key: value[:BATCH].numpy() for key, value in packed.program(name, weights).inputs.items()}
        save_file({key: np.ascontiguousarray(value) for key, value in rows.items()}, tmp_path / "in.safetensors")
        return tmp_path / "in.safetensors"

    return make


@pytest.mark.invariant("compiler-1")
@pytest.mark.parametrize(
    ("name", "weights", "target", "emit"),
    [*((*case, "c") for case in CASES), *((*case, "machine") for case in MACHINES)],
)
def test_the_program_has_the_bits_of_the_machine(name, weights, target, emit, inputs, tmp_path):
    """Contract (d), with nothing installed where it runs; and neither threads nor repetitions change a bit."""
    folder, expected = program(name, weights, target, emit), executed(name, weights, HOST)[:BATCH].numpy()
    given = ("--inputs", str(inputs(name, weights)), "--function", f"denoise_b{BATCH}")
    for options in ((), ("--threads", "3", "--repeat", "2")):
        output = tmp_path / f"out{len(options)}.safetensors"
        done = run(folder, target, *given, "--output", str(output), *options)
        assert done.returncode == 0, done.stderr
        assert np.array_equal(load_file(output)["sample"].view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize(
    ("name", "target"),
    [("fashion-unet", "aarch64-neon"), ("fashion-dit", "aarch64-dotprod"), ("fashion-text", "aarch64-i8mm")],
)
def test_images_have_the_bits_of_the_machine(name, target, tmp_path):
    """Ten steps of each bundled denoiser: the sampler runs here, every call of the denoiser in the program."""
    if platform.machine() != "aarch64" and (absent := qemu.missing()):
        pytest.skip(absent)
    model = denoiser.load(name)
    lowered = driver_lower.lower(model, driver_options.Options(recipe="w8a8", samples=2, steps=4)).program
    folders = {}
    for each in (HOST, target):
        row = targets.resolve(each)
        built = build(lowered, row, (2, 4), jobs=2, cache=packed.kernel_cache(), emit="c")
        folders[each] = packed.write(tmp_path / f"{each}.mpq", lowered, row, built)
    machine = compiled_denoiser.load(folders[HOST], threads=1)
    # The scheduler's timesteps are whole numbers; `run` takes them as the artifact's type, the program as they are.
    kinds = {value["name"]: value["dtype"] for value in machine.manifest["functions"][0]["inputs"]}

    def remote(**inputs: np.ndarray) -> np.ndarray:
        rows = {key: np.ascontiguousarray(value, kinds[key]) for key, value in inputs.items()}
        save_file(rows, tmp_path / "in")
        function = f"denoise_b{len(inputs['timestep'])}"
        options = ("--inputs", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--function", function)
        done = run(folders[target], target, *options)
        assert done.returncode == 0, done.stderr
        return load_file(tmp_path / "out")["sample"]

    painter = evaluation_painter.from_denoiser(model)
    drawn = [
        replace(painter, call=call).draw(painter.conditioning.varied(2), 2, 10, seed=3)
        for call in (lambda **inputs: machine.run(inputs), remote)
    ]
    assert np.array_equal(drawn[0].view(np.uint32), drawn[1].view(np.uint32))


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=40))
def test_tensors_that_are_needed_at_once_do_not_overlap(rows):
    sizes = {str(i): size for i, (size, _, _) in enumerate(rows)}
    alive = {str(i): (min(a, b), max(a, b)) for i, (_, a, b) in enumerate(rows)}
    places, total = standalone.offsets(sizes, alive)
    assert all(at % tensorfile.ALIGNMENT == 0 and at + sizes[name] <= total for name, at in places.items())
    for a in sizes:
        for b in sizes:
            together = alive[a][0] <= alive[b][1] and alive[b][0] <= alive[a][1]
            apart = places[a] + sizes[a] <= places[b] or places[b] + sizes[b] <= places[a]
            assert a == b or apart or not together
    lower = max(sum(s for n, s in sizes.items() if alive[n][0] <= t <= alive[n][1]) for t in range(21))
    assert lower <= total <= sum(standalone._aligned(size) for size in sizes.values())


def test_what_it_refuses(tmp_path):
    """A sentence and exit code 1; nothing of a result is written."""
    name, weights, target = CASES[1]
    folder, output = program(name, weights, target, "c"), tmp_path / "out.safetensors"
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = bytearray((folder / bundle.WEIGHTS).read_bytes())
    data[-1] ^= 1
    (copy / bundle.WEIGHTS).write_bytes(data)

    def refused(*options: str, where: Path = folder, cpu: str = "") -> str:
        done = run(where, target, "--output", str(output), *options, cpu=cpu)
        assert done.returncode == 1 and not output.exists()
        return done.stderr

    sentence = refused(cpu="cortex-a53")
    assert "asimddp" in sentence and "which the kernels for 'aarch64-dotprod' need" in sentence
    assert "holds other weights than those of this build" in refused(where=copy)
    (copy / bundle.WEIGHTS).write_bytes(data[:-8])
    assert f"has {len(data) - 8} bytes, and the weights of this build {len(data)}" in refused(where=copy)
    (copy / bundle.WEIGHTS).unlink()
    assert "No such file" in refused(where=copy)
    assert "there is no function 'denoise_b3'; there are denoise_b1 denoise_b4" in refused("--function", "denoise_b3")
    assert "this artifact has no input '" in refused("--inputs", str(folder / bundle.WEIGHTS))
    assert "cannot read" in refused("--inputs", str(tmp_path / "none"))
    assert "not known" in refused("--colour", "red")


def test_equal_bytes(tmp_path):
    """Of everything that is added to the artifact, whatever the folder."""
    name, weights, target = CASES[0]
    case, row = packed.program(name, weights), targets.resolve(target)
    builds = [build(case.program, row, (1, BATCH), jobs=jobs, cache=tmp_path / f"{jobs}", emit="c") for jobs in (1, 2)]
    assert builds[0].files == builds[1].files
    program_ = builds[0].files[bundle.PROGRAM]
    assert str(tmp_path).encode() not in program_ and str(Path.cwd()).encode() not in program_


def test_what_a_program_on_tvms_runtime_refuses(tmp_path):
    """Files of another build, before any of them is opened, and wheels that are not there."""
    name, weights, target = MACHINES[0]
    copy = shutil.copytree(program(name, weights, target, "machine"), tmp_path / "copy")
    done = run(copy, target, "--profile", "kernels")
    assert done.returncode == 1 and "compile with --emit c" in done.stderr
    (copy / "libtvm_runtime.so").unlink()
    done = run(copy, target)
    assert done.returncode == 1 and "cannot load TVM's runtime" in done.stderr
    data = bytearray((copy / bundle.KERNELS).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / bundle.KERNELS).write_bytes(data)
    done = run(copy, target)
    assert done.returncode == 1 and "holds other kernels than those of this build" in done.stderr
    with pytest.raises(
        UserError, match=r"there is no apache_tvm-.*aarch64\.whl in .*: get TVM's runtime .* `pip download"
    ):
        compile.compile(packed.BUNDLED, tmp_path / "out.mpq", target="aarch64-neon", standalone=True, wheels=tmp_path)
    with pytest.raises(UserError, match="standalone makes a program of kernels for CPUs; 'onnx' has none"):
        compile.compile(packed.BUNDLED, tmp_path / "out.mpq", target="onnx", standalone=True)
    with pytest.raises(UserError, match="wheels holds TVM's runtime for standalone: add that"):
        compile.compile(packed.BUNDLED, tmp_path / "out.mpq", wheels=tmp_path)
    with pytest.raises(UserError, match="leave one of them out"):
        compile.compile(packed.BUNDLED, tmp_path / "out.mpq", emit="c", standalone=True)


def test_every_file_that_a_program_on_tvms_runtime_opens_is_signed(tmp_path):
    name, weights, target = MACHINES[0]
    own, other = signatures.keys()
    copy = Path(shutil.copytree(program(name, weights, target, "machine"), tmp_path / "copy"))
    unsigned = run(copy, target, "--key", own.hex)
    assert unsigned.returncode == 1 and "has no signature" in unsigned.stderr
    signatures.signed(copy, own)
    done = run(copy, target, "--key", own.hex)
    assert done.returncode == 0 and "calls: median" in done.stdout, done.stderr
    assert "is of another key" in run(copy, target, "--key", other.hex).stderr
    for file in (bundle.WEIGHTS, bundle.KERNELS, "libtvm_ffi.so", "libtvm_runtime.so"):
        before = (copy / file).read_bytes()
        (copy / file).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        done = run(copy, target, "--key", own.hex)
        assert done.returncode == 1 and f"{file} is not the file that was signed" in done.stderr
        (copy / file).write_bytes(before)


EMBEDDED = """
import ctypes, sys, threading
import numpy as np
from safetensors.numpy import load_file

mpq = ctypes.CDLL("./libmpq.so")
mpq.mpq_open.restype = ctypes.c_void_p
model = mpq.mpq_open(sys.argv[1].encode(), 2)
names = sys.argv[3].split(",")

def run(values):
    output = np.empty_like(values["sample"])
    arrays = [np.ascontiguousarray(values[name]) for name in names]
    pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    assert mpq.mpq_run(ctypes.c_void_p(model), 1, pointers, ctypes.c_void_p(output.ctypes.data)) == 0
    return output

given = load_file(sys.argv[2])
for name in ("timestep", "encoder_hidden_states", "sample"):
    first = run(given)
    other = run({**given, name: np.ascontiguousarray(given[name][::-1])})
    assert not np.array_equal(first, other), name
    assert np.array_equal(run(given), first), name
    mpq.mpq_forget(ctypes.c_void_p(model))
    assert np.array_equal(run(given), first), name
if sys.argv[4] == "c":
    expected = run(given)
    libm = ctypes.CDLL("libm.so.6")
    assert libm.fesetround({upwards}) == 0  # the caller's rounding is not that of the kernels
    rounded = run(given)
    libm.fesetround(0)
    assert np.array_equal(rounded, expected)

    wrong = []
    def others():
        wrong.extend(i for i in range(30) if not np.array_equal(run(given), expected))
    thread = threading.Thread(target=others)
    thread.start()
    while thread.is_alive():  # the threads of all are stopped, and started again
        mpq.mpq_close(ctypes.c_void_p(mpq.mpq_open(sys.argv[1].encode(), 2)))
    thread.join()
    assert not wrong
mpq.mpq_close(ctypes.c_void_p(model))
"""


@pytest.mark.parametrize("emit", ["c", "machine"])
def test_a_program_computes_what_is_new(emit, inputs, tmp_path):
    """As a library in another program: what it keeps of timesteps and texts is theirs."""
    name, weights, target = MACHINES[0]
    folder = program(name, weights, target, emit)
    own = ("mpq.c", standalone.KERNELS) if emit == "c" else ("mpq_vm.c",)
    sources = [standalone.MODEL, *standalone.CRYPTOGRAPHY, *own]
    command = ["gcc", *standalone.LINKED, "-shared", "-fPIC", *(str(folder / source) for source in sources)]
    subprocess.run([*command, "-ldl", "-lpthread", "-lm", "-o", tmp_path / "libmpq.so"], check=True)
    function = bundle.read(folder).manifest["functions"][1]
    names = ",".join(value["name"] for value in function["inputs"])
    given = (str(folder / bundle.WEIGHTS), str(inputs(name, weights)), names, emit)
    code = EMBEDDED.replace("{upwards}", "0x400000" if platform.machine() == "aarch64" else "0x800")
    subprocess.run([sys.executable, "-c", code, *given], check=True, cwd=tmp_path, timeout=300)


@pytest.mark.parametrize("emit", ["c", "machine"])
def test_the_example_of_cmake_builds(emit, tmp_path):
    if not shutil.which("cmake"):
        pytest.skip("cmake is not installed")
    name, weights, target = CASES[0] if emit == "c" else MACHINES[0]
    folder, made = program(name, weights, target, emit), tmp_path / "build"
    for command in (("cmake", "-S", str(folder), "-B", str(made)), ("cmake", "--build", str(made))):
        subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([made / "mpq_run", "--weights", folder / bundle.WEIGHTS], capture_output=True, text=True)
    assert done.returncode == 0 and "calls: median" in done.stdout


def test_streaming_vectors_of_a_program(inputs, tmp_path):
    """It asks for the length of its kernels before their threads start, and needs no SVE outside streaming mode."""
    name, weights, target = STREAMING
    folder, expected = program(name, weights, target, "c"), executed(name, weights, HOST)[:BATCH].numpy()
    output = tmp_path / "out.safetensors"
    given = ("--inputs", str(inputs(name, weights)), "--output", str(output), "--function", f"denoise_b{BATCH}")
    for cpu in (qemu.SHORT, f"{qemu.STREAMING},sve=off"):
        done = run(folder, target, *given, "--threads", "2", cpu=cpu)
        assert done.returncode == 0, done.stderr
        assert np.array_equal(load_file(output)["sample"].view(np.uint32), expected.view(np.uint32))
        output.unlink()
    done = run(folder, target, *given, cpu="max,sme256=on,sme_fa64=off")
    assert done.returncode == 1 and not output.exists()
    assert "the system lets no process use sme2" in done.stderr


def test_a_program_refuses_a_cpu_without_the_features_of_its_kernels(tmp_path):
    """Attentions and layers in bfloat16 want more than the target of that name."""
    case, _ = programs.bfloat16_layers()
    row = targets.TARGETS["x86-64-avx512vnni"]
    built = build(case, row, (1,), cache=tmp_path, emit="c")
    model = built.files["mpq_model.c"]
    text = (model if isinstance(model, bytes) else Path(model).read_bytes()).decode()
    (listed,) = re.findall(r"features\[\] = \{(.*?)\}", text)
    assert built.features and all(f'"{name}"' in listed for name in (*row.features, *built.features))
