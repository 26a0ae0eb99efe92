"""Calls on tensors that are on the emulated GPU: of the runtime's own there, for torch finds no GPU in an emulator."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")
from mpq_compiler.backends.tvm.build import build
from mpq_compiler.targets import table as targets
from tests.harness import packed
from tests.harness.cuda import emulator, kernels, nvcc

PRELUDE = """
import ctypes, pickle, sys
import numpy as np
from mpq_compiler.runtime import compiled_denoiser as runtime, on_gpu
from mpq_compiler.support.errors import UserError

path, inputs = pickle.load(sys.stdin.buffer)

def load(**options):
    return runtime.load(path, **options)

def there(machine, arrays):
    return {name: machine._tensor(np.ascontiguousarray(array)) for name, array in arrays.items()}

def call(denoiser, tensors):
    (found,) = denoiser(**tensors, return_dict=False)
    return denoiser.executor._received(found)

def says(what, function):
    try:
        function()
    except UserError as error:
        assert what in str(error), error
        return
    raise AssertionError(f"no error says {what}")
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """(an artifact for a GPU, its inputs)"""
    emulator.needs()
    folder = tmp_path_factory.mktemp("gpu")
    case, target = packed.program("sd15", "int8"), targets.resolve("cuda-sm90")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_HOME", str(nvcc.install(folder / "cuda")))
        built = build(case.program, target, (1, 2), jobs=2, cache=folder)
    path = packed.write(folder / "model.mpq", case.program, target, built)
    return path, {name: value.numpy()[:5] for name, value in case.inputs.items()}


def run(artifact: tuple[Path, dict[str, Any]], script: str, devices: str = "1") -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        input=pickle.dumps(artifact),
        capture_output=True,
        env=kernels.environment(MPQ_EMULATED_SM="90", MPQ_EMULATED_DEVICES=devices),
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]


def test_the_bits_of_a_call_by_way_of_the_cpu(artifact):
    """Of one sample, of two, and of a batch that is run in parts, the last of which is padded."""
    run(artifact, """
denoiser = load()
for count in (1, 2, 5):
    own = {name: array[:count] for name, array in inputs.items()}
    found = call(denoiser, there(denoiser.executor, own))
    assert found.dtype == np.float32 and found.tobytes() == denoiser.run(own).tobytes(), count
""")


def test_one_timestep_for_a_batch(artifact):
    """On the GPU, as an array, and as a number; other inputs stay on the GPU."""
    run(artifact, """
denoiser = load()
own = {name: array[:2] for name, array in inputs.items()}
own["timestep"] = np.repeat(own["timestep"][:1], 2)
expected = denoiser.run(own)
tensors = there(denoiser.executor, own)
one = own["timestep"][:1]
for timestep in (there(denoiser.executor, {"t": one})["t"], one, float(one[0])):
    assert call(denoiser, {**tensors, "timestep": timestep}).tobytes() == expected.tobytes()
""")


def test_in_a_graph_of_the_callers(artifact):
    """Which reads its inputs anew in every launch; a call of the machine's own graphs in between changes nothing."""
    run(artifact, """
denoiser = load()
machine = denoiser.executor
own = {name: array[:2] for name, array in inputs.items()}
others = {name: array[2:4] for name, array in inputs.items()}
tensors, out = there(machine, own), machine.empty((2, *denoiser.run(own).shape[1:]), "float32")
driver, stream, graph = ctypes.CDLL(None), ctypes.c_void_p(), ctypes.c_void_p()
assert driver.cudaStreamCreate(ctypes.byref(stream)) == 0

def call():
    taken = [on_gpu.taken(n, t, denoiser._kinds[0].inputs[n], machine.from_dlpack) for n, t in tensors.items()]
    pieces = [each.rows(0, 2, 2, 2) for each in taken]
    result = machine.call("denoise_b2", pieces, stream.value, True)
    machine.end(result, out.data_ptr(), 0, 2, stream.value, True)

assert driver.cudaStreamBeginCapture(stream, 0) == 0
call()
assert driver.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
assert (machine._received(out).view(np.uint8) == 0xA5).all()  # nothing has run
for arrays in (own, others, own):
    for name, tensor in tensors.items():
        machine._send(np.ascontiguousarray(arrays[name]), tensor)
    assert driver.cudaGraphLaunch(graph, stream) == 0
    assert machine._received(out).tobytes() == denoiser.run(arrays).tobytes()
""")


def test_refusals(artifact):
    run(artifact, """
denoiser = load()
machine = denoiser.executor
own = {name: array[:2] for name, array in inputs.items()}
tensors = there(machine, own)
says("input 'encoder_hidden_states' is on the CPU, and 'sample' on cuda:0: put them on one device",
     lambda: denoiser(**{**tensors, "encoder_hidden_states": own["encoder_hidden_states"]}))
half = there(machine, {"x": own["sample"].astype(np.float16)})["x"]
says("input 'sample' is float16; this artifact takes float32", lambda: denoiser(**{**tensors, "sample": half}))
small = there(machine, {"x": own["sample"][:, :, :-1]})["x"]
says("input 'sample' has shape [2,", lambda: denoiser(**{**tensors, "sample": small}))
pieces = [[(t.data_ptr(), 4)] for t in tensors.values()]
says("called once before", lambda: machine.call("denoise_b2", pieces, 0, True))
says("there is no cuda:1 on this machine: it has 1 GPUs", lambda: load(device="cuda:1"))
says("name a GPU, such as cuda:1", lambda: load(device="gpu"))
""")


def test_two_devices(artifact):
    """Each has an artifact of its own, and the thread's current device stays what it was."""
    run(artifact, """
first, second = load(), load(device="cuda:1")
own = {name: array[:2] for name, array in inputs.items()}
runtime_ = ctypes.CDLL(None)

def current():
    found = ctypes.c_int(-1)
    assert runtime_.cudaGetDevice(ctypes.byref(found)) == 0
    return found.value

expected = first.run(own)
for device, denoiser in enumerate((first, second)):
    for other in (0, 1):
        assert runtime_.cudaSetDevice(other) == 0
        assert denoiser.run(own).tobytes() == expected.tobytes() and current() == other
        assert call(denoiser, there(denoiser.executor, own)).tobytes() == expected.tobytes()
        assert runtime_.cudaSetDevice(other) == 0
assert second.to("cuda:1") is second and first.to("cuda") is first and second.device == "cuda:1"
says("cannot move to cuda:0: this one is on cuda:1; load it there", lambda: second.to("cuda:0"))
tensors = there(first.executor, own)
says("input 'sample' is on cuda:0, and this artifact on cuda:1: .to('cuda:1'), or load it there, "
     "mpq_compiler.load(..., device='cuda:0')", lambda: second(**tensors))
""", devices="2")


def test_a_device_for_an_artifact_of_the_cpu(tmp_path):
    case, target = packed.program(packed.BUNDLED, "int8"), targets.resolve("x86-64-avx2")
    path = packed.write(tmp_path / "model.mpq", case.program, target, build(case.program, target, (1,), cache=tmp_path))
    from mpq_compiler.runtime import compiled_denoiser
    from mpq_compiler.support.errors import UserError

    with pytest.raises(UserError, match=r"device is 'cuda', and .* is for 'x86-64-avx2'"):
        compiled_denoiser.load(path, device="cuda")
    assert np.isfinite(compiled_denoiser.load(path).run({n: v.numpy()[:1] for n, v in case.inputs.items()})).all()
