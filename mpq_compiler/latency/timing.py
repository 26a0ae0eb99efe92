"""Calls of an artifact timed in turns, kernel by kernel where it is asked."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpq_compiler.artifact import bundle as artifacts
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.runtime.tvm import VirtualMachine
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import nvidia

WINDOW = 8e-3
"""Seconds that a turn takes at the least: shorter calls are repeated."""


@dataclass
class Times:
    """Seconds a call in each round, by both clocks."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def of(self, clock: str) -> list[float]:
        return self.cpu if clock == "cpu" else self.wall


# --- measuring ----------------------------------------------------------------------------------------------


def repeats(call: Callable[[], object]) -> int:
    call()
    start = time.perf_counter()
    call()
    return max(1, int(WINDOW / max(time.perf_counter() - start, 1e-7)))


def turn(call: Callable[[], object], repeats: int, times: Times) -> None:
    wall, used = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    times.cpu.append((time.process_time() - used) / repeats)
    times.wall.append((time.perf_counter() - wall) / repeats)


# --- kernels ------------------------------------------------------------------------------------------------


def kernel_calls(compiled: compiled_denoiser.CompiledDenoiser) -> list[dict[str, Any]]:
    if artifacts.SCHEDULE not in compiled.manifest["files"]:
        return []
    return json.loads(compiled.artifact.file(artifacts.SCHEDULE).read_text(encoding="utf-8"))


def require_timed_kernels(compiled: compiled_denoiser.CompiledDenoiser, batch: int) -> None:
    if compiled.manifest["target"]["backend"] != "tvm" or not kernel_calls(compiled):
        raise UserError(f"{compiled.artifact.path} has no kernels that could be timed; leave --kernels and --plot out")
    if nvidia.is_for(compiled.manifest):
        raise UserError(
            f"the kernels of {compiled.artifact.path} are launched as one graph, which NVIDIA's nsys takes apart; "
            "leave --kernels and --plot out"
        )
    sizes = sorted({f["batch"] for f in compiled.manifest["functions"]})
    if batch not in sizes:
        known = ", ".join(map(str, sizes))
        raise UserError(f"--kernels times one function, and there is none for a batch of {batch}: take {known}")


def profile(compiled: compiled_denoiser.CompiledDenoiser, inputs: Arrays) -> list[tuple[str, float, float, int]]:
    """(kernel, CPU seconds, seconds, bytes of its operands) of each kernel call of a run that knows nothing, in order.

    A part that runs for several samples counts as one call of each of its kernels.
    """
    batch = len(next(iter(inputs.values())))
    function = next(f for f in compiled.manifest["functions"] if f["batch"] == batch)
    known = frozenset(row["kernel"] for row in kernel_calls(compiled))
    machine = compiled._executor
    assert isinstance(machine, VirtualMachine), "only TVM's machine knows single kernels"
    machine.forget()
    before = {name: part.computed for name, part in machine.parts.items()}
    timed = iter(machine.profile(function["name"], [inputs[value["name"]] for value in function["inputs"]], known))
    runs = {name: part.computed - before[name] for name, part in machine.parts.items()}
    found: list[tuple[str, float, float, int]] = []
    for part, rows in itertools.groupby(kernel_calls(compiled), lambda row: row.get("part")):
        count = len(list(rows))
        each = [[next(timed) for _ in range(count)] for _ in range(runs.get(str(part), 1))]
        for calls in zip(*each, strict=True):
            names, used, wall, size = zip(*calls, strict=True)
            found.append((names[0], sum(used), sum(wall), sum(size)))
    return found


Arrays = Mapping[str, np.ndarray]


def random_inputs(manifest: Mapping[str, Any], batch: int) -> dict[str, np.ndarray]:
    """Inputs of an artifact, always the same: normal floats, a timestep of 500, class 0, tokens as were compiled in."""
    generator = np.random.default_rng(0)
    found = {}
    for value in manifest["functions"][0]["inputs"]:
        shape, dtype = (batch, *value["shape"][1:]), np.dtype(value["dtype"])
        if value["name"] == "timestep":
            found["timestep"] = np.full(shape, 500, dtype)
        elif dtype.kind == "f":
            found[value["name"]] = generator.standard_normal(shape).astype(dtype)
        else:
            found[value["name"]] = np.full(shape, dtype.kind == "b", dtype)
    for assumed in manifest.get("assumptions", ()):
        found[assumed["input"]][:, assumed["token"]] = np.asarray(assumed["values"], np.float32)
    return found
