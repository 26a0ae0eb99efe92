"""Tunes the tiles of the integer kernels by times on this machine (``mpqc compile --tune``).

Tiles change the time of a kernel and the order of weights in memory, but no bit of a result. Each kernel is timed with
every tile of `weight_layout.tiles`, in turns with a control: a loop of dot products on registers. It runs on
one thread, measured by CPU time, and its weights come from memory as they do in a model. A tile is chosen where it is
faster than the default by more than `GAIN`. The cache keeps the times, so that with the same cache a compilation makes
the same choices.
"""

from __future__ import annotations

import functools
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler.backends.tvm.plan.calls import Call, Kernel, Lowered
from mpq_compiler.pipeline.backend import Progress
from mpq_compiler.support import cache as caches
from mpq_compiler.support import host
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import tracked
from mpq_compiler.targets.table import Target, missing_features

KIND = "tiles"
"""The folder in the cache."""
GAIN = 0.04
"""The least gain, as a share of the time; smaller gains cannot be told from noise."""
ROUNDS, WINDOW = 15, 1e-3
"""The number of rounds in which all tiles take turns, and the seconds of a turn."""
WEIGHTS = 64 << 20
"""Bytes of the memory from which calls take their weights in turn: more than most caches hold."""
ALIGNED = 64  # bytes

Tile = tuple[int, int]
"""Registers and rows of a tile."""
Times = Mapping[Tile, float]
"""The time of each tile as a multiple of the control's; the default tile comes first."""


def tuned(
    lowered: Lowered,
    target: Target,
    worker: Callable[..., Any],
    sources: str,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Lowered, dict[str, Tile]]:
    """Chooses the fastest tiles of a plan's integer kernels.

    Args:
        lowered: the plan.
        target: what it is compiled for; this CPU must run it.
        worker: calls `measure` in a process with TVM.
        sources: a digest of the kernels' sources.
        cache: the cache folder; None takes the default.
        progress: opens a progress bar, or None.

    Returns:
        The plan with these tiles, and the tiles that differ from the default, by node.

    Raises:
        UserError: this CPU cannot run the target's kernels.
    """
    if lacking := missing_features(target):
        raise UserError(
            f"--tune measures kernels here, and this CPU lacks {', '.join(lacking)}, which '{target.name}' needs: "
            "compile without --tune, or on such a CPU"
        )
    version = importlib.metadata.version("apache-tvm")
    key = caches.digest(sources, Path(__file__).read_bytes(), target.name, host.identity(), version)
    known = caches.Results(KIND, key, cache)
    kernels = [kernel for kernel in lowered.kernels() if kernel.template == "gemm"]
    times: dict[Kernel, Times] = {}
    with tracked(progress, "tuning kernels", len(kernels)) as advance:
        for kernel in kernels:
            if str(kernel) not in known:
                known[str(kernel)] = worker("tune", kernel, target)
            times[kernel] = {(registers, rows): ratio for registers, rows, ratio in known[str(kernel)]}
            advance(1)
    return _with_tiles(lowered, times)


def choose(times: list[Times]) -> list[Tile]:
    """Chooses the tile of each of some kernels that read the same weights, and thus must agree on registers."""
    default = [next(iter(each)) for each in times]

    def best(registers: int) -> list[Tile]:
        return [min((t for t in each if t[0] == registers), key=each.__getitem__) for each in times]

    def total(tiles: list[Tile]) -> float:
        return sum(each[tile] for each, tile in zip(times, tiles, strict=True))

    common = set.intersection(*({registers for registers, _ in each} for each in times))
    fastest = min((best(registers) for registers in sorted(common)), key=total)
    return fastest if total(fastest) < (1 - GAIN) * total(default) else default


def _with_tiles(lowered: Lowered, times: Mapping[Kernel, Times]) -> tuple[Lowered, dict[str, Tile]]:
    readers: dict[str, dict[Kernel, None]] = {}
    for call in lowered.calls():
        if call.kernel in times:
            readers.setdefault(dict(call.operands)["tiles"], {})[call.kernel] = None
    chosen: dict[tuple[str, Kernel], Tile] = {}
    registers: dict[str, int] = {}
    for weights, kernels in readers.items():
        for kernel, tile in zip(kernels, choose([times[k] for k in kernels]), strict=True):
            first = next(iter(times[kernel]))
            if tile != first:
                chosen[weights, kernel] = tile
            if tile[0] != first[0]:
                registers[weights] = tile[0]
    tiles: dict[str, Tile] = {}

    def of(call: Call) -> Call:
        made = [registers[value] for _, value in call.results if value in registers]
        if made:
            return replace(call, kernel=replace(call.kernel, problem=call.kernel.problem.replace(tile=(made[0], 0))))
        tile = chosen.get((dict(call.operands).get("tiles", ""), call.kernel))
        if tile is None:
            return call
        tiles[call.node] = tile
        return replace(call, kernel=replace(call.kernel, problem=call.kernel.problem.replace(tile=tile)))

    preparation = tuple(map(of, lowered.preparation))
    functions = tuple(function.mapped(of) for function in lowered.functions)
    return replace(lowered, preparation=preparation, functions=functions), tiles


# --- in a worker --------------------------------------------------------------------------------------------


def measure(kernel: Kernel, target: Target) -> list[tuple[int, int, float]]:
    """Times each tile of a kernel at batch 1: (registers, rows, time over the control's)."""
    from mpq_compiler.backends.tvm import templates
    from mpq_compiler.backends.tvm.compile import peak
    from mpq_compiler.backends.tvm.kernels.cpu import weight_layout
    from mpq_compiler.backends.tvm.kernels.cpu.isa import isa

    found = weight_layout.tiles(templates.resolve(kernel.problem), isa(target.name))
    if len(found) == 1:
        return [(*found[0], 1.0)]
    calls = [_call(replace(kernel, problem=kernel.problem.replace(tile=tile)), target) for tile in found]
    control, _ = peak.integer(isa(target.name))
    repeats = [max(1, int(WINDOW / max(_seconds(call, 1), 1e-9))) for call in calls]
    ratios: list[list[float]] = [[] for _ in calls]
    for turn in range(ROUNDS):
        unit = _seconds(control, 1)
        for i in sorted(range(len(calls)), reverse=bool(turn % 2)):
            ratios[i].append(_seconds(calls[i], repeats[i]) / unit)
    return [(*tile, statistics.median(times)) for tile, times in zip(found, ratios, strict=True)]


@functools.cache
def _memory() -> np.ndarray:
    """The memory of the weights, shared by all tiles, since its address changes times as much as a tile does."""
    return _drawn(WEIGHTS)


def _drawn(size: int) -> np.ndarray:
    """At least ``size`` random bytes from an aligned address."""
    drawn = np.random.default_rng(0).integers(0, 128, size + 2 * ALIGNED, np.uint8)
    return drawn[-drawn.ctypes.data % ALIGNED :]


def _call(kernel: Kernel, target: Target) -> Callable[[], None]:
    """Compiles a kernel to a call that reads other weights each time."""
    import tvm

    from mpq_compiler.backends.tvm import templates
    from mpq_compiler.backends.tvm.kernels.common import template

    kernels = template.module({kernel.name: templates.build(kernel, target)})
    made = tvm.compile(kernels, target=tvm.target.Target(dict(target.tvm)))
    function = made[kernel.name]
    inputs, outputs = templates.arguments(kernel, target)
    own, weights = {}, []
    for a in (*inputs, *outputs):
        shape = tuple(1 if isinstance(extent, str) else extent for extent in a.shape)
        array = _drawn(int(np.prod(shape)))[: int(np.prod(shape))].reshape(shape).astype(a.dtype)
        if a.name == "group":
            array[:] = 0
        own[a.name] = tvm.runtime.tensor(array)
        if a.name == "tiles":
            starts = range(0, _memory().size - array.nbytes, -(-array.nbytes // ALIGNED) * ALIGNED)
            parts = (_memory()[i : i + array.nbytes].view(a.dtype).reshape(shape) for i in starts)
            weights = [tvm.runtime.from_dlpack(part) for part in parts]
    lists = [[*(own | {"tiles": each}).values()] for each in weights or [own["tiles"]]]
    turn = 0

    def call() -> None:
        nonlocal turn
        turn = (turn + 1) % len(lists)
        function(*lists[turn])

    return call


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.thread_time_ns()
    for _ in range(repeats):
        call()
    return (time.thread_time_ns() - start) / repeats / 1e9
