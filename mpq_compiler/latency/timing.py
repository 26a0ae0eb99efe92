"""Times calls of an artifact, whole or kernel by kernel."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpq_compiler.artifact import bundle as artifacts
from mpq_compiler.runtime import compiled_denoiser, covered
from mpq_compiler.runtime.tvm import VirtualMachine
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import nvidia

WINDOW = 8e-3
"""The least duration of a turn in seconds; shorter calls are repeated."""


@dataclass
class Times:
    """Seconds of a call in each round, by two clocks."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def of(self, clock: str) -> list[float]:
        """The times by a clock, "cpu" or "wall"."""
        return self.cpu if clock == "cpu" else self.wall


# --- measuring ----------------------------------------------------------------------------------------------


def repeats(call: Callable[[], object]) -> int:
    """The number of calls that fill `WINDOW`, by the time of one call."""
    call()
    start = time.perf_counter()
    call()
    return max(1, int(WINDOW / max(time.perf_counter() - start, 1e-7)))


def turn(call: Callable[[], object], repeats: int, times: Times) -> None:
    """Takes a turn of ``repeats`` calls and appends the mean time of a call to ``times``."""
    wall, used = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    times.cpu.append((time.process_time() - used) / repeats)
    times.wall.append((time.perf_counter() - wall) / repeats)


# --- kernels ------------------------------------------------------------------------------------------------


def kernel_calls(compiled: compiled_denoiser.CompiledDenoiser) -> list[dict[str, Any]]:
    """The rows of an artifact's schedule.json; none where it has no such file."""
    if artifacts.SCHEDULE not in compiled.manifest["files"]:
        return []
    calls: list[dict[str, Any]] = json.loads(compiled.artifact.file(artifacts.SCHEDULE).read_text(encoding="utf-8"))
    return calls


def require_timed_kernels(compiled: compiled_denoiser.CompiledDenoiser, batch: int) -> None:
    """Raises a UserError where an artifact's kernels cannot be timed one by one, or none is for the batch."""
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
    """Times each kernel call of one run, with no results kept from earlier runs.

    A part that runs for several samples counts as one call of each of its kernels.

    Returns:
        For each call, in order, the kernel, CPU seconds, elapsed seconds, and bytes of its operands.
    """
    batch = len(next(iter(inputs.values())))
    function = next(f for f in compiled.manifest["functions"] if f["batch"] == batch)
    known = frozenset(row["kernel"] for row in kernel_calls(compiled))
    machine = compiled.executor
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
"""Inputs of an artifact by name."""


def random_inputs(manifest: Mapping[str, Any], batch: int) -> dict[str, np.ndarray]:
    """Inputs of an artifact, the same at every call: normal floats, timestep 500, class 0, tokens as compiled in.

    Values beyond what the artifact was calibrated on are brought to its ends.
    """
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
    return covered.clipped(manifest, found)
