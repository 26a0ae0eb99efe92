"""The most that this machine does: loops of multiply-accumulates and of copies, which take turns with what is timed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpq_compiler.bench.subject import Subject
from mpq_compiler.latency.timing import Times
from mpq_compiler.targets import nvidia

COPIED = 64 << 20
"""Bytes of the copy that the memory's bandwidth is measured with: more than caches hold."""


@dataclass(frozen=True)
class Peaks:
    """Loops that do nothing but one thing, and how much of it a call does."""

    loops: tuple[Subject, ...]
    work: Mapping[str, float]
    reason: str | None

    def figures(self, times: Mapping[str, Times], clock: str) -> dict[str, Any]:
        """The best of all rounds: ``gmacs`` of 8-bit integers and of f32 on one core, ``gbytes`` copied a second."""
        best = {name: self.work[name] / min(times[name].of(clock)) / 1e9 for name in self.work}
        return {
            "gmacs": best.get("peak integer"),
            "float_gmacs": best.get("peak float"),
            "gbytes": best["peak copy"],
            "model_gmacs": None,
            "reached": None,
            "reason": self.reason,
        }


def peaks(manifest: Mapping[str, Any]) -> Peaks:
    """The loops for the target of an artifact; compiled here, so that without TVM only the copy is left."""
    source = np.zeros(COPIED // 8)
    target = np.zeros_like(source)
    loops = [Subject("peak copy", lambda: np.copyto(target, source))]
    work: dict[str, float] = {"peak copy": 2.0 * COPIED}  # it reads and it writes
    reason = None
    if manifest["target"]["backend"] != "tvm":
        reason = "an artifact for another runtime has no kernels of ours to hold against a peak"
    elif nvidia.is_for(manifest):
        reason = "the peaks of a GPU are not measured"
    elif importlib.util.find_spec("tvm") is None:
        reason = "the peaks are compiled here, which needs TVM's compiler: pip install 'mpq-compiler[compile]'"
    else:
        from mpq_compiler.backends.tvm.compile import peak
        from mpq_compiler.backends.tvm.kernels.cpu.isa import isa

        family = isa(manifest["target"]["name"])
        for name, make in (("peak integer", peak.integer), ("peak float", peak.floating)):
            call, macs = make(family)
            loops.append(Subject(name, call))
            work[name] = macs
    return Peaks(tuple(loops), work, reason)
