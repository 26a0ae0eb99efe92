"""Calls on tensors that are on the emulated GPU: of the runtime's own there, for torch finds no GPU in an emulator."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("tvm")
import mpq_compiler
from mpq_compiler.backends.tvm.build import build
from mpq_compiler.runtime import on_gpu
from mpq_compiler.targets import table as targets
from tests.harness import packed, programs
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
def compiled(tmp_path_factory):
    """(an artifact for a GPU whose steps may reuse a value, the model)"""
    emulator.needs()
    folder, denoiser = tmp_path_factory.mktemp("gpu"), programs.denoiser("sd15")
    save_file({"encoder_hidden_states": rows_of(denoiser, 3)["encoder_hidden_states"]}, folder / "texts.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_HOME", str(nvcc.install(folder / "cuda")))
        mpq_compiler.compile(
            denoiser,
            folder / "model.mpq",
            pipeline=programs.KEPT,
            target="cuda-sm90",
            shapes="1x4x16x16,2x4x16x16",
            conditions=folder / "texts.safetensors",
        )
    return folder / "model.mpq", denoiser


@pytest.fixture
def artifact(compiled):
    """(an artifact for a GPU, its inputs)"""
    path, denoiser = compiled
    return path, rows_of(denoiser, 5)


@pytest.fixture
def reusing(compiled):
    """(an artifact for a GPU whose steps reuse a value, inputs of two sets of conditions)"""
    path, denoiser = compiled
    return path, [rows_of(denoiser, 1, seed) for seed in (0, 1)]


def rows_of(denoiser: Any, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in denoiser.random_inputs(count, seed).items()}


def run(artifact: tuple[Path, Any], script: str, devices: str = "1", **variables: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        input=pickle.dumps(artifact),
        capture_output=True,
        env=kernels.environment(MPQ_EMULATED_SM="90", MPQ_EMULATED_DEVICES=devices, **variables),
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


def test_every_size_of_images(artifact):
    """The result has the size of the call, not that of the first function: here one for smaller images."""
    run(artifact, """
import copy
denoiser = load()
functions = denoiser._kinds[0].functions
smaller = {**copy.deepcopy(functions[0]), "name": "smaller"}
for value in (smaller["inputs"][0], smaller["output"]):
    value["shape"][2:] = [8, 8]
functions.insert(0, smaller)
own = {name: array[:2] for name, array in inputs.items()}
found, expected = call(denoiser, there(denoiser.executor, own)), denoiser.run(own)
assert found.shape == expected.shape == own["sample"].shape and found.tobytes() == expected.tobytes(), found.shape
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
    machine.end(result, [(out.data_ptr(), 4 * int(np.prod(out.shape[1:])))], 0, 2, stream.value, True)

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


STEPS = """
denoiser = load()
machine, times = denoiser.executor, denoiser.manifest["reuse"]["timesteps"]
called = []
original = machine.call
machine.call = lambda function, *rest: called.append(function) or original(function, *rest)

def latents(step):
    return np.random.default_rng(step).standard_normal(inputs[0]["sample"].shape, np.float32)

def drawn(conditions, predict, order=range(len(times))):
    for step in order:
        for own in conditions:
            count, kind = own["timestep"].shape, own["timestep"].dtype
            yield predict({**own, "sample": latents(step), "timestep": np.full(count, times[step], kind)})

def by_arrays(arrays):
    return np.array(denoiser(**arrays, return_dict=False)[0])
"""


def test_steps_reuse_what_stays_on_the_gpu(reusing):
    """The bits of steps by way of the CPU: of two sets of conditions, the timestep anywhere."""
    run(reusing, STEPS + """
held = [there(machine, {n: own[n] for n in own if n not in ("sample", "timestep")}) for own in inputs]

def by_tensors(arrays):
    number = next(i for i, own in enumerate(inputs) if own["encoder_hidden_states"] is arrays["encoder_hidden_states"])
    changing = {"sample": arrays["sample"], **({"timestep": arrays["timestep"]} if number else {})}
    return call(denoiser, {"timestep": arrays["timestep"], **there(machine, changing), **held[number]})

with denoiser.reusing():
    expected = list(drawn(inputs, by_arrays))
assert not called
with denoiser.reusing():
    found = list(drawn(inputs, by_tensors))
assert [a.tobytes() for a in found] == [a.tobytes() for a in expected]
reused = sum(map(bool, denoiser.manifest["reuse"]["sources"]))
assert sum("reusing" in name for name in called) == 2 * reused > 0
beyond = next(drawn(inputs, by_tensors, [2]))
assert beyond.tobytes() == next(drawn(inputs, by_arrays, [2])).tobytes() != found[2 * 2].tobytes()
""")


def test_kept_values_are_read_where_they_lie():
    """Sample by sample the values of all kept ones, and the last sample again where a function takes more."""
    parts = [on_gpu.There(address, (3, 5), np.dtype(np.float32), None, None) for address in (1000, 2000)]
    stacked = on_gpu.Stacked(parts)
    assert stacked.shape == (3, 2, 5) == on_gpu.standing_in(stacked).shape
    assert stacked.rows(1, 3, 4, 3) == [(1020, 20), (2020, 20)] + 3 * [(1040, 20), (2040, 20)]


def test_conditions_that_are_other_tensors_are_other_conditions(reusing):
    """Of every call new ones, in memory that the last ones had: nothing is taken of another's, and a notice says so."""
    run(reusing, STEPS + """
import warnings

order = [0, 1, 2, 3, 0]
with denoiser.reusing(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = list(drawn(inputs[:1], lambda arrays: call(denoiser, there(machine, arrays)), order))
assert not any("reusing" in name for name in called)
assert [a.tobytes() for a in found] == [a.tobytes() for a in drawn(inputs[:1], by_arrays, order)]
assert ["sets of conditions" in str(each.message) for each in caught] == [True], caught
""")


@pytest.mark.parametrize("devices", ["1", "2"])
def test_threads_that_call_for_the_first_time(artifact, devices):
    """While one captures its graph others neither load nor call, which would spoil it: all have the bits of one."""
    run(artifact, """
from concurrent.futures import ThreadPoolExecutor
own = {name: array[:2] for name, array in inputs.items()}
expected = load().run(own)
count = ctypes.c_int()
assert ctypes.CDLL(None).cudaGetDeviceCount(ctypes.byref(count)) == 0

def loaded(number):
    return load(device=f"cuda:{number % count.value}")

def by_way_of_the_cpu(number):
    return loaded(number).run(own)

early = [loaded(number) for number in range(2)]
given = [there(denoiser.executor, own) for denoiser in early]
with ThreadPoolExecutor(4) as pool:
    asked = pool.map(call, early, given), pool.map(by_way_of_the_cpu, range(2))
    assert all(each.tobytes() == expected.tobytes() for several in asked for each in several)
""", devices, MPQ_EMULATED_CAPTURE_MS="100")
