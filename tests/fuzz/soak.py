"""Calls of one artifact from several threads: the same bits each time, in constant memory."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from mpq_compiler.runtime import compiled_denoiser
from tests.fuzz.artifacts import INPUTS


def resident() -> int:
    """Bytes of this process that lie in memory, as the system counts them."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def soak(artifact: Path, calls: int, threads: int = 4) -> tuple[int, list[int]]:
    """Calls an artifact; returns how many results were wrong, and the bytes in memory at ten points."""
    denoiser = compiled_denoiser.load(artifact, threads=1)
    right = denoiser.run(INPUTS).copy()
    wrong, each, points = [0] * threads, calls // threads, []

    def work(number: int) -> None:
        for turn in range(each):
            if not np.array_equal(denoiser.run(INPUTS), right):
                wrong[number] += 1
            if number == 0 and turn % (each // 10) == 0:
                points.append(resident())

    running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return sum(wrong), points
