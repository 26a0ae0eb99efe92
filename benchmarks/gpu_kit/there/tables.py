"""Step 3: what the machine can do at most, and our kernels beside torch's, in turns.

What is timed is a CUDA graph of launches by events, each launch with weights and activations of its own, several times
what the level-2 cache holds. Ours are held against their definition before they are timed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import data, machine
from .machine import Call

SETS, MOST_SETS = 4, 16
"""Times what the level-2 cache holds: bytes of all tensors of a contestant; and the most of them."""
ROUNDS, WINDOW = 7, 2e-3
CONTROL = "control"
COPY, SIDE = 4 << 30, 8192


def cases() -> list[dict[str, Any]]:
    """What was built: each case at each batch size."""
    found: list[dict[str, Any]] = json.loads((machine.HERE / "tables" / "cases.json").read_text())
    return found


def run(out: Path, only: str = "") -> list[str]:
    """Writes `tables.json`; returns what is wrong."""
    path = out / "tables.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"ceilings": None, "cases": {}}
    device, torch = machine.Device(), machine.torch_or_none()
    if torch is not None:
        found["torch"] = f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        found["ceilings"] = found["ceilings"] or ceilings(torch, device)
        machine.say(json.dumps(found["ceilings"]))
    level = machine.facts()["level"]
    for case in cases():
        if case["name"] in found["cases"] or only not in case["name"] or case["level"] != level:
            continue
        found["cases"][case["name"]] = row = measured(case, device, torch is not None)
        machine.say(described(case, row))
        machine.write(path, found)
    machine.write(path, found)
    rows = found["cases"].items()
    return [f"{case}: {n}: {text}" for case, row in rows for n, text in {**row["wrong"], **row["failed"]}.items()]


def described(case: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """A line of a case."""
    times = ", ".join(f"{one['name']} {one['us']:.1f}" for one in row["rows"])
    return f"{case['name']}: us: {times}" + "".join(f"; {n} {text}" for n, text in row["wrong"].items())


def ceilings(torch: Any, device: machine.Device) -> dict[str, float]:
    """Bytes a second of a copy, read and written, and operations a second of torch's largest products."""
    from . import peers

    peers.settle()
    a = torch.empty(COPY // 4, dtype=torch.float32, device="cuda").normal_()
    b = torch.empty_like(a)
    calls: dict[str, tuple[float, Call]] = {"copy, TB/s": (2e-12 * COPY, lambda: b.copy_(a))}
    square = {"kind": "linear", "batch": 1, "height": SIDE, "channels": SIDE, "outputs": SIDE}
    for name in peers.OF["linear"]:
        calls[f"{name}, TOP/s"] = (2e-12 * SIDE**3, peers.make(name, square))
    found = {}
    for name, (amount, call) in calls.items():
        call()
        found[name] = amount / statistics.median(device.seconds(call, 10) for _ in range(5))
    calls.clear()
    torch.cuda.empty_cache()
    return found


def measured(case: Mapping[str, Any], device: machine.Device, compared: bool) -> dict[str, Any]:
    """The times of a case, microseconds of a call, and what is wrong or failed."""
    found: dict[str, Any] = {"wrong": {}, "failed": {}, "sets": {}, "ungraphed": {}}
    library = machine.load().load_module(str(machine.HERE / "tables" / case["library"]))
    launches: dict[str, Call] = {}

    def attempt(name: str, make: Callable[[], Call]) -> None:
        try:
            launches[name] = make()
        except Exception as error:  # peers raise errors of many kinds
            found["failed"][name] = machine.reason(error)
            device.synchronize()

    with np.load(machine.HERE / "tables" / case["arrays"]) as stored:
        for name, own in {**case["ours"], CONTROL: next(iter(case["ours"].values()))}.items():
            attempt(name, functools.partial(_ours, name, own, library, stored, device, found))
    sets = max(found["sets"].values(), default=1)
    if compared:
        from . import peers

        peers.settle()
        for name in peers.OF.get(case["kind"], ()):
            make = functools.partial(peers.make, name, case)
            attempt(name, functools.partial(_repeated, name, make, sets, device, peers.graph, found))
            found["sets"][name] = sets
    times = machine.interleaved(launches, ROUNDS, WINDOW, device.seconds)
    per_call = {name: [t / found["sets"][name] for t in own] for name, own in times.items()}
    rows = [machine.median_row(name, per_call) for name in per_call]
    found["rows"] = [row | {"tops": 2e-6 * case["macs"] / row["us"]} for row in rows]
    return found


def contestant(own: Mapping[str, Any], library: Any, stored: Any) -> tuple[Callable[[], tuple[Call, Any]], int]:
    """(what makes a call with tensors of its own, and the tensor of its result; bytes of its tensors)"""
    tensors, arrays = machine.Tensors(), {}
    for name, what in own["arrays"].items():
        if "stored" in what:
            arrays[name] = stored[what["stored"]]
        elif "seed" in what:
            arrays[name] = data.drawn(what)
        else:
            arrays[name] = data.empty(what["shape"], what["dtype"])
    for kernel, names in own["prepare"]:
        there = {name: tensors.put(arrays[name]) for name in names}
        library[kernel](*there.values())
        arrays |= {name: tensors.take(there[name]) for name in own["prepared"] if name in there}
    for name, shape in own.get("shaped", {}).items():
        arrays[name] = arrays[name].reshape(shape)
    used = list(dict.fromkeys(name for _, names in own["kernels"] for name in names))

    def make() -> tuple[Call, Any]:
        there = {name: tensors.put(arrays[name]) for name in used}
        launches = [(library[kernel], [there[name] for name in names]) for kernel, names in own["kernels"]]

        def call() -> None:
            for kernel, operands in launches:
                kernel(*operands)

        return call, there[own["result"]]

    return make, sum(arrays[name].nbytes for name in used)


def _ours(
    name: str, own: Mapping[str, Any], library: Any, stored: Any, device: machine.Device, found: dict[str, Any]
) -> Call:
    make, size = contestant(own, library, stored)
    call, result = make()
    call()
    if reason := wrong(own, machine.Tensors().take(result), stored):
        found["wrong"][name] = reason
    sets = max(1, min(MOST_SETS, SETS * device.cache_bytes // size))
    found["sets"][name] = sets
    return _repeated(name, lambda: make()[0], sets, device, device.captured, found)


def wrong(own: Mapping[str, Any], result: np.ndarray, stored: Any) -> str | None:
    """What is wrong with a result, by its first and last lines."""
    lines = data.edges(result.reshape(own["as"]), own["lines"])
    if "sha256" in own:
        return None if hashlib.sha256(lines.tobytes()).hexdigest() == own["sha256"] else "not the definition's bits"
    picked, expected = lines.reshape(-1)[stored[own["at"]]], stored[own["expected"]]
    off = float(np.abs(picked - expected).max() / np.abs(expected).max())
    return None if off <= own["bound"] else f"{off:.1e} off its meaning"


def _repeated(
    name: str,
    make: Callable[[], Call],
    sets: int,
    device: machine.Device,
    capture: Callable[[Sequence[Call]], Call],
    found: dict[str, Any],
) -> Call:
    """A launch of several calls as one graph; one by one, and the reason among what is found, where none is made."""
    calls = [make() for _ in range(sets)]
    for call in (*calls, *calls):
        call()
    device.synchronize()
    try:
        graph = capture(calls)
        graph()
        device.synchronize()
        return lambda kept=calls: graph()  # type: ignore[misc]  # which uses the tensors of the calls
    except Exception as error:  # torch's are of many kinds
        device.synchronize()
        found["ungraphed"][name] = f"{type(error).__name__}: {error}"
        return lambda: [call() for call in calls]
