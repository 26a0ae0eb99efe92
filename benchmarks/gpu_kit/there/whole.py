"""Step 5: whole denoisers, ours beside torch's fp16; of large ones the weights are drawn on this machine."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import machine

ROUNDS, WINDOW = 5, 0.1
KERNELS = 30
"""Of which times are kept, those that take longest."""


def models() -> list[dict[str, Any]]:
    """What was built: each denoiser at each batch size."""
    path = machine.HERE / "models" / "models.json"
    return json.loads(path.read_text()) if path.exists() else []


def run(out: Path, only: str = "", compiled: bool = True) -> list[str]:
    """Writes `whole.json`; returns what is wrong."""
    path = out / "whole.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    device, torch, wrong = machine.Device(), machine.torch_or_none(), []
    level = machine.facts()["level"]
    with tempfile.TemporaryDirectory(prefix="mpq-kit-") as folder:
        for model in models():
            key = f"{model['name']}, batch {model['batch']}"
            if key in found or only not in key or model["level"] != level:
                continue
            found[key] = row = measured(model, device, torch, Path(folder), compiled)
            machine.say(f"{key}: " + json.dumps({one["name"]: round(one["us"]) for one in row["rows"]}))
            wrong += [f"{key}: {name}: {text}" for name, text in row["failed"].items()]
            machine.write(path, found)
    return wrong


def measured(
    model: Mapping[str, Any], device: machine.Device, torch: Any, folder: Path, compiled: bool
) -> dict[str, Any]:
    """Times of calls: ours on the device, ours from and to the host, and torch's; and of our kernels, each."""
    from mpq_compiler.runtime import compiled_denoiser

    parts = ("failed", "sqnr_db", "gpu_bytes", "kernels", "stays", "reused", "captured")
    found: dict[str, Any] = {part: {} for part in parts}
    with np.load(machine.HERE / "models" / model["arrays"]) as arrays:
        inputs = {name.removeprefix("input."): arrays[name] for name in arrays.files if name.startswith("input.")}
        expected = {name.removeprefix("expected."): arrays[name] for name in arrays.files if "expected." in name}
    calls: dict[str, Callable[[], object]] = {}
    denoisers: dict[str, Any] = {}

    def attempt(name: str, make: Callable[[], Callable[[], object]]) -> bool:
        before = device.free_bytes()
        try:
            call = make()
            for _ in range(3):
                call()
            device.synchronize()
        except Exception as error:
            found["failed"][name] = machine.reason(error)
            return False
        calls[name], found["gpu_bytes"][name] = call, before - device.free_bytes()
        return True

    for name, artifact in model["artifacts"].items():
        denoiser = compiled_denoiser.load(_ready(artifact, folder), reuse_bytes=0)
        if not attempt(f"{name}, host to host", functools.partial(lambda each: functools.partial(each.run, inputs),
                                                                  denoiser)):  # fmt: skip
            continue
        result = denoiser.run(inputs)
        for other, values in expected.items():
            found["sqnr_db"][f"{name} to {other}"] = _sqnr_db(values, result)
        if torch is None:
            continue
        call = _staying(torch, denoiser, inputs)
        attempt(name, lambda call=call: call)  # type: ignore[misc]
        found["kernels"][name] = kernels(torch, call)
        found["stays"][name] = stays(torch, denoiser, inputs, result)
        if denoiser.manifest.get("reuse"):
            found["reused"][name] = reused(torch, device, denoiser, inputs)
        denoisers[name] = denoiser
    if torch is not None and model["peer"]:
        from . import peers

        peers.settle()
        module, given = _module(torch, model["peer"], inputs, folder)
        for name in (peers.HALF, peers.GRAPH, *((peers.COMPILED,) if compiled else ())):
            attempt(name, functools.partial(peers.denoiser, name, module, given))
        found["kernels"][peers.HALF] = kernels(torch, calls[peers.HALF]) if peers.HALF in calls else {}
    times = machine.interleaved(calls, ROUNDS, WINDOW, device.wall)
    found["rows"] = [machine.median_row(name, times) for name in times]
    for name, denoiser in denoisers.items():
        found["captured"][name] = captured(torch, device, denoiser, inputs)
    return found


def _staying(torch: Any, denoiser: Any, inputs: Mapping[str, np.ndarray]) -> Callable[[], Any]:
    """A call on torch's tensors on the GPU, whose result stays there."""
    given = {name: torch.from_numpy(array).cuda() for name, array in inputs.items()}
    return lambda: denoiser(**given, return_dict=False)[0]


def stays(torch: Any, denoiser: Any, inputs: Mapping[str, np.ndarray], expected: np.ndarray) -> dict[str, Any]:
    """Whether tensors that stay give the bits of a call by way of the CPU, on any stream; and half precision."""
    call, found = _staying(torch, denoiser, inputs), {}
    own = torch.from_numpy(expected)
    found["the same bits"] = bool(torch.equal(call().cpu(), own))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results = [call() for _ in range(3)]
    stream.synchronize()
    found["on another stream"] = all(torch.equal(result.cpu(), own) for result in results)
    half = {name: torch.from_numpy(array).cuda() for name, array in inputs.items()}
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in half.items()}
    found["bfloat16 in and out"] = denoiser(**half, return_dict=False)[0].dtype == torch.bfloat16
    found["in torch.compile's graphs"] = _in_graphs(torch, denoiser, inputs, own)
    return found


def _in_graphs(torch: Any, denoiser: Any, inputs: Mapping[str, np.ndarray], expected: Any) -> bool | str:
    """Whether a function around a call, which torch compiles and captures, has the call's bits; or why it fails."""
    given = {name: torch.from_numpy(array).cuda() for name, array in inputs.items()}

    @torch.compile(fullgraph=True, mode="reduce-overhead")  # type: ignore[untyped-decorator, unused-ignore]
    def step(tensors: Mapping[str, Any]) -> Any:
        return denoiser(**tensors, return_dict=False)[0] * 2

    try:
        results = [step(given).cpu() for _ in range(4)]
        return all(torch.equal(result, expected * 2) for result in results)
    except Exception as error:
        return machine.reason(error)
    finally:
        torch.compiler.reset()  # its graphs hold memory


def reused(torch: Any, device: machine.Device, denoiser: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Whether steps that reuse what stays on the GPU have the bits of those by way of the CPU.

    And microseconds of a step: where all is computed, and where some steps reuse.
    """
    latent, draw = denoiser.input_names[0], np.random.default_rng(0)
    steps = [
        {**inputs, latent: draw.standard_normal(inputs[latent].shape, np.float32),
         "timestep": np.full_like(inputs["timestep"], timestep)}
        for timestep in denoiser.manifest["reuse"]["timesteps"]
    ]  # fmt: skip
    stays = {name: torch.from_numpy(array).cuda() for name, array in inputs.items()}
    changing = [{name: torch.from_numpy(step[name]).cuda() for name in (latent, "timestep")} for step in steps]

    def drawn() -> list[Any]:
        return [denoiser(**{**stays, **step}, return_dict=False)[0] for step in changing]

    def reusing() -> list[Any]:
        with denoiser.reusing():
            return drawn()

    try:
        whole, found = drawn(), reusing()
        call = denoiser.steps()
        same = [bool(np.array_equal(call(**step), own.cpu().numpy())) for step, own in zip(steps, found, strict=True)]
        less = sum(not torch.equal(a, b) for a, b in zip(whole, found, strict=True))
        us = {
            name: 1e6 / len(steps) * min(device.wall(function, 5) for _ in range(3))
            for name, function in (("us of a step", drawn), ("us with reuse", reusing))
        }
        return {"the same bits": all(same), "steps that reuse": f"{less} of {len(steps)}", **us}
    except Exception as error:
        return {"failed": machine.reason(error)}


def captured(torch: Any, device: machine.Device, denoiser: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A call in a CUDA graph of torch's: whether it has the bits of a call by itself, and its microseconds; or why not.

    Behind all else: where a capture fails, torch draws no more random numbers.
    """
    call = _staying(torch, denoiser, inputs)
    own = call().cpu()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        graph.replay()
        torch.cuda.synchronize()
        same = bool(torch.equal(result.cpu(), own))
        return {"the same bits": same, "us": 1e6 * min(device.wall(graph.replay, 20) for _ in range(3))}
    except Exception as error:
        chain: list[str] = []
        one: BaseException | None = error
        while one is not None:
            chain.append(machine.reason(one))
            one = one.__context__
        return {"failed": chain}


def kernels(torch: Any, call: Callable[[], object]) -> dict[str, Any]:
    """Microseconds and launches of a call by torch's profiler.

    Of kinds of kernels, by how their names begin, and of those that take longest.
    """
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    rows = [
        {"kernel": each.key[:120], "us": float(each.device_time_total), "launches": each.count}
        for each in seen.key_averages()
        if each.device_time_total
    ]
    kinds: dict[str, list[float]] = {}
    for row in rows:
        kind = kinds.setdefault(re.split(r"_[0-9a-f]{16}|[<(]", row["kernel"])[0][:40], [0.0, 0])
        kind[0] += row["us"]
        kind[1] += row["launches"]
    return {"kinds": kinds, "longest": sorted(rows, key=lambda row: -row["us"])[:KERNELS]}


def _sqnr_db(exact: np.ndarray, found: np.ndarray) -> float:
    noise = float(((found.astype(np.float64) - exact) ** 2).mean())
    return 10 * math.log10(float((exact.astype(np.float64) ** 2).mean()) / max(noise, 1e-300))


def _ready(name: str, folder: Path) -> Path:
    """An artifact of the kit; where its weights are described alone, they are drawn."""
    source = machine.HERE / "models" / name
    described = source / "drawn.json"
    if not described.exists():
        return source
    from mpq_compiler.artifact import bundle

    path = folder / name
    if not path.exists():
        with np.load(source / "kept.npz") as kept:
            tensors = {each: kept[each] for each in kept.files}
        draw = np.random.default_rng(0)
        for each, what in json.loads(described.read_text()).items():
            if np.dtype(what["dtype"]).kind == "f":
                tensors[each] = (what["deviation"] * draw.standard_normal(what["shape"], np.float32)).astype(
                    what["dtype"]
                )
            else:
                limits = np.iinfo(what["dtype"])
                low = -64 if limits.min < 0 else limits.min
                tensors[each] = draw.integers(low, 64 if low else limits.max + 1, what["shape"], what["dtype"])
        manifest = json.loads((source / "manifest.json").read_text())
        files = {each.name: each for each in source.iterdir() if each.name in manifest["files"]}
        files = {each: file for each, file in files.items() if each != bundle.WEIGHTS}
        bundle.write(path, manifest, files, tensors)
    return path


def _module(torch: Any, peer: Mapping[str, Any], inputs: Mapping[str, np.ndarray], folder: Path) -> tuple[Any, Any]:
    """(a model of diffusers in fp16, its weights drawn on the GPU; its inputs there)"""
    packages = folder / "packages"
    if not packages.exists():
        shutil.unpack_archive(machine.HERE / "lib" / "diffusers.zip", packages)
        sys.path.insert(0, str(packages))
    import diffusers

    torch.manual_seed(0)
    with torch.device("cuda"):
        module = getattr(diffusers, peer["class"]).from_config(peer["config"])
    module = module.to(torch.float16).to(memory_format=torch.channels_last).eval()
    given: dict[str, Any] = {}
    for name, array in inputs.items():
        value = torch.from_numpy(array).cuda()
        value = value.half() if value.dtype == torch.float32 and value.ndim > 1 else value
        place = given if name in peer["parameters"] else given.setdefault("added_cond_kwargs", {})
        place[name] = value
    return module, given
