"""Cells of tables of what things take: a process that is watched to its end, and results kept cell by cell.

A cell is what one process took, in JSON. A run replaces the cells that it measures and leaves the others.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpq_compiler.support import usage

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROWS, SIZE = 64, 32
"""The rows of a model's calls, and the height and width of their latents."""
SPARED = 2 << 30
"""Bytes of the machine's memory that a watched process leaves to the system and to who watches it."""
LIBC, PARENT_ENDS = ctypes.CDLL(None), 1
"""The C library, and its PR_SET_PDEATHSIG: the signal that a process gets when who started it ends."""
LOOK = 0.02
"""Seconds between two looks at whether a process has ended, and at its memory."""


@dataclass(frozen=True)
class Ended:
    """What a process took, over all its children."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    error: str | None
    """Why it failed, in a sentence; None: it did not."""

    def taken(self) -> dict[str, Any]:
        """What it took, for a cell."""
        return {
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
            "peak_bytes": self.peak_bytes,
        }


def memory_limit() -> int:
    """The bytes that a process may use here: all that the machine has but `SPARED`."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") - SPARED


def run(
    module: str, *arguments: str, limit: int | None = None, folder: Path = ROOT, environment: Mapping[str, str] = {}
) -> Ended:
    """Runs ``python -m module`` in a process group of its own, watches its memory, and ends it above the limit.

    A limit of the address space would not do: what runtimes reserve and never touch would count. Should memory grow
    faster than it is looked at, the system ends this process first, and none beside it. It ends with its watcher, too.

    Args:
        module: dotted name of a module.
        arguments: of the command line.
        limit: bytes, anonymous and shared, of the process and its children; None is what the machine has.
        folder: it runs there, so that what it leaves in its working folder is left there.
        environment: variables beside those of this process.
    """
    most = limit or memory_limit()
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", module, *arguments]
    begin, cpu = time.perf_counter(), usage.cpu_seconds()
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "PYTHONPATH": paths, **environment}, preexec_fn=_die_first,
    )  # fmt: skip
    killed = False
    with usage.PeakMemory(process.pid) as peak:
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)
        said = b""
        while process.poll() is None:
            time.sleep(LOOK)
            said = (said + (process.stderr.read() or b""))[-100_000:]
            if not killed and usage.memory(process.pid) > most and usage.memory_once(process.pid) > most:
                os.killpg(process.pid, signal.SIGKILL)
                killed = True
        said += process.stderr.read() or b""
    error = None
    if killed:
        error = f"needs more than {most / 2**30:.1f} GiB of memory"
    elif process.returncode == -signal.SIGKILL:
        error = "is ended by the system, which has no more memory"
    elif process.returncode < 0:
        error = f"ends with signal {-process.returncode}"
    elif process.returncode:
        error = sentence((said.decode(errors="replace").strip().splitlines() or ["no word"])[-1])
    return Ended(time.perf_counter() - begin, usage.cpu_seconds() - cpu, peak.take(), error)


def _die_first() -> None:
    LIBC.prctl(PARENT_ENDS, signal.SIGKILL)
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")


def sentence(text: str) -> str:
    """An error without the places of this machine, and without what would break a table."""
    places = re.compile(r"(?<![\w.])/(?:[\w.+@-]+/)+")
    return " ".join(places.sub("", text).replace("|", "/").split())[:300]


def keep(path: Path, found: Mapping[str, Any], keys: Sequence[str], order: Mapping[str, Sequence[str]]) -> None:
    """Adds a cell to a file of results, in place of the one that is alike in ``keys``.

    Args:
        path: the file.
        found: the cell.
        keys: what tells cells apart.
        order: the values of some of them in the order in which cells stand; parameters come next.
    """
    cells = [cell for cell in read(path) if any(cell[key] != found[key] for key in keys)] + [dict(found)]

    def place(cell: Mapping[str, Any]) -> tuple[Any, ...]:
        ranks = [[*values].index(cell[key]) if cell[key] in values else len(values) for key, values in order.items()]
        return (*ranks, cell["parameters"])

    text = json.dumps({"cells": sorted(cells, key=place)}, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    """The cells of a file of results; none where there is no such file."""
    return list(json.loads(path.read_text(encoding="utf-8"))["cells"]) if path.exists() else []


def prepared(name: str, folder: Path) -> Path:
    """The file of calls of a model, whose checkpoint and calls are written unless they are there."""
    from benchmarks import realistic  # what watches needs no torch

    realistic.write(name, folder)
    calls = folder / "calls.safetensors"
    if not calls.exists():
        realistic.write_calls(name, calls, ROWS, SIZE)
    return calls


def machines(cells: Sequence[Mapping[str, Any]]) -> str:
    """The sentence on where cells were measured; where that differs, all but the most frequent machine name theirs.

    Cells of earlier states do not say what their CPU can do (``isa``).
    """
    by_machine: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        isa = f" ({cell['isa']})" if "isa" in cell else ""
        by_machine.setdefault(f"{cell['cpu']}{isa}, {cell['cores']} cores", []).append(cell)
    first, *others = sorted(by_machine, key=lambda name: (-len(by_machine[name]), name))
    text = f"Measured on {first}"
    for name in others:
        here = by_machine[name]
        told: dict[str, None] = {}
        for cell in here:
            whole = all(other in here for other in cells if other["model"] == cell["model"])
            keys = ("model",) if whole else ("model", "setting", "peer", "subject")
            told[" ".join(str(cell[key]) for key in keys if key in cell)] = None
        text += f"; on {name}: {', '.join(told)}"
    return f"{text}."
