"""Step 1: every kernel that tests know, called as they call it, twice, in poisoned memory.

Each library has a process of its own, and another one for what follows a call that ends it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler.targets import nvidia

from . import machine

PATIENCE = 60
"""Seconds that a library may take: a kernel may never end."""
STORED = np.dtype(np.uint16)
"""What bfloat16 is stored as."""
NEXT = {STORED: 2.0**-7, np.dtype(np.float16): 2.0**-10}
"""How far from the largest value the next one is, by what sums are rounded to where they are stored."""


def fitting() -> list[Path]:
    """The libraries that have code for this machine's GPU."""
    level, found = machine.facts()["level"], sorted((machine.HERE / "bits").glob("*.json"))
    return [path for path in found if nvidia.runs(about(path)["levels"], level)]


def about(library: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(library.read_text())
    return found


def run(out: Path) -> list[str]:
    """Writes `bits.json`; returns what is wrong."""
    path = out / "bits.json"
    rows: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())["libraries"] if path.exists() else {}
    for library in fitting():
        told = about(library)
        if told["test"] in rows:
            continue
        own: list[dict[str, Any]] = []
        while len(own) < len(told["calls"]):
            own += _called(library, len(own))
            if len(own) < len(told["calls"]):
                own.append({"kernel": told["calls"][len(own)]["kernel"], "crashed": True})
        rows[told["test"]] = own
        machine.say(f"{told['test']}: {_summary(own)}")
        machine.write(path, {"libraries": rows})
    return [f"{test}: {call}" for test, calls in rows.items() for call in calls if not right(call)]


def right(call: dict[str, Any]) -> bool:
    """Whether a call gave what it must."""
    return not call.get("crashed") and bool(call["same"]) and (call["off"] == 0 or call["off"] <= call["bound"])


def _summary(calls: list[dict[str, Any]]) -> str:
    exact = sum(not call.get("crashed") and call["off"] == 0 for call in calls)
    text = f"{len(calls)} calls, {exact} with the emulator's bits"
    off = max((call["off"] for call in calls if not call.get("crashed")), default=0)
    wrong = sum(not right(call) for call in calls)
    return text + (f", else {off:.1e} off at most" if off else "") + (f"; {wrong} WRONG" if wrong else "")


def _called(library: Path, first: int) -> list[dict[str, Any]]:
    command = [sys.executable, str(machine.HERE / "run.py"), "--child", "bits", str(library), str(first)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        return _rows(output.decode() if isinstance(output, bytes) else output)
    if done.returncode:
        machine.say(f"  {library.stem}: {' '.join(done.stderr.strip().splitlines()[-3:])[-600:]}")
    return _rows(done.stdout)


def _rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def child(library: Path, first: int) -> None:
    """Prints a line of each call, from the first on."""
    for row in calls(library, first):
        print(json.dumps(row), flush=True)


def calls(library: Path, first: int = 0, twice: bool = True) -> Iterator[dict[str, Any]]:
    """Makes the calls of a library, from the first on."""
    tensors, told = machine.Tensors(), about(library)
    compiled = machine.load().load_module(str(library.with_suffix(".so")))
    for call in told["calls"][first:]:
        given = [_array(library, name) for name in call["given"]]
        results = {int(i): _array(library, name) for i, name in call["results"].items()}
        found = []
        for _ in range(2 if twice else 1):
            if twice:
                tensors.poison()
            there = [tensors.put(array) for array in given]
            compiled[call["kernel"]](*there)
            found.append([tensors.take(tensor) for tensor in there])
        off, differ = 0.0, 0
        for i, result in enumerate(found[0]):
            expected = results.get(i, given[i])
            if result.tobytes() != expected.tobytes():
                differ += int((_bytes(result) != _bytes(expected)).any(-1).sum())
                off = max(off, _error(result, expected))
        yield {
            "kernel": call["kernel"],
            "same": all(a.tobytes() == b.tobytes() for a, b in zip(found[0], found[-1], strict=True)),
            "differ": differ,
            "off": off,
            "bound": _bound(told["off"].get(call["kernel"], 0.0), [given[i] for i in results]),
        }


def _array(library: Path, name: str) -> np.ndarray:
    array: np.ndarray = np.load(library.parent / name)
    return array


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8)


def _bound(off: float, results: list[np.ndarray]) -> float:
    """How far results may be off, by how far sums may be: what is rounded of these may fall to the other side."""
    return max([off, *(NEXT.get(array.dtype, 0.0) for array in results)]) if off else off


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest value; of codes, in codes; infinite where one is not finite."""
    if found.dtype == STORED:
        found, expected = ((array.astype(np.uint32) << 16).view(np.float32) for array in (found, expected))
    if found.dtype.kind != "f":
        return float(np.abs(found.astype(np.int64) - expected.astype(np.int64)).max())
    a, b = found.astype(np.float64), expected.astype(np.float64)
    if (np.isnan(a) != np.isnan(b)).any() or (np.isinf(a) != np.isinf(b)).any():
        return float("inf")
    finite = np.isfinite(b)
    return float(np.abs(a - b)[finite].max() / max(float(np.abs(b[finite]).max()), 1e-30))
