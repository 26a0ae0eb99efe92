"""The program before its budget, in the cache: another budget of the same model begins there.

Nothing before sensitivities depends on what a plan may take: rewrites, calibration and time groups are the same for
every budget. A program is a folder with a file for each large tensor, named by its content, and one that is written
last and has the rest (`ir.parcels`) and these names: compilations that write one program at a time leave no mixture.
The model's own tensors are left out, for whoever asks has them.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from typing import cast

import numpy as np
import torch

from mpq_compiler import formats
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir import parcels, scratch
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.passes import Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization import statistics
from mpq_compiler.quantization.kept_files import SPARED
from mpq_compiler.support import cache

KIND = "stages"
REST = "program"
"""The file with all but the large tensors, whose names are its first line."""
LEAST_SECONDS = 3.0
"""The CPU seconds from which on a program is kept."""
MOST = 16 << 30
"""The bytes of all programs in the cache: the one that nobody used for longest goes first."""
BUDGETED = (Role.MEASURES, Role.ALLOCATES)
"""The roles of passes that may depend on the budget, as all behind them do."""

_logger = logging.getLogger(__name__)


def before_budget(passes: Sequence[Pass]) -> list[Pass]:
    """The leading passes that depend on no budget; none where no pass has one. Passes of plugins may read anything."""
    if not any(step.role in BUDGETED for step in passes):
        return []
    ours = __name__.partition(".")[0]
    free = itertools.takewhile(lambda p: p.role not in BUDGETED and type(p).__module__.startswith(f"{ours}."), passes)
    return list(free)


class StageFiles:
    """The file of one program, which passes make of the laid-out one."""

    def __init__(self, before: Program, passes: Sequence[Pass], session: Session) -> None:
        """Names the file, in the session's cache, by the digest of all that it depends on."""
        assert session.denoiser is not None
        self.known = dict(before.tensors)  # of which passes add to the store
        text, drawn = _drawing(session.denoiser)
        given = {f"calibration {name}": tensor for name, tensor in (session.calibration or {}).items()}
        named = [getattr(step, "weights", None) for step in passes]
        used = [formats.version(name) for name in named if isinstance(name, str)]
        wanted = dataclasses.replace(session.requests, statistics=frozenset()), sorted(session.requests.statistics)
        of_session = wanted, session.seed, session.steps, session.device
        graph, tensors = statistics.content(before)
        about = f"stages 2 {parcels.identity()} {[*passes]} {used} {of_session} {before.model} {before.inputs}"
        self.place = cache.folder(session.cache) / KIND / cache.digest(about, text, drawn, given, graph, tensors)

    def load(self) -> tuple[Program, float] | None:
        """The program, and the CPU seconds that it took; None where there is none that is whole."""
        if (rest := cache.read(self.place / REST)) is None:
            return None
        names, _, stream = rest.partition(b"\n")
        large = []
        for name in names.decode().split():
            if (content := cache.read(self.place / name)) is None:
                return None
            held = scratch.kept(torch.from_numpy(np.frombuffer(bytearray(content), np.uint8)))
            large.append(held.numpy())
        found = cast(tuple[Program, float], parcels.unpack(stream, large, known=self.known))
        os.utime(self.place)
        return found

    def save(self, program: Program, seconds: float) -> bool:
        """Writes the program where it took long and there is room; returns whether it did.

        UserError: the cache cannot be written.
        """
        if seconds < LEAST_SECONDS:
            return False
        stream, large = parcels.pack((program, seconds), known=self.known)
        size = sum(tensor.nbytes for tensor in large)
        cache.make(self.place.parent)
        if size > MOST or shutil.disk_usage(self.place.parent).free < SPARED * size:
            _logger.info("the program before its budget is not kept: it takes %.1f GB", size / 1e9)
            return False
        names = []
        for tensor in large:
            content = parcels.memory(tensor).tobytes()
            names.append(cache.digest(content))
            cache.write(self.place / names[-1], content)
        cache.write(self.place / REST, " ".join(names).encode() + b"\n" + stream)
        self._evict()
        return True

    def _evict(self) -> None:
        """Deletes the programs that nobody used for longest, until the others fit."""
        rest = MOST
        with suppress(FileNotFoundError):  # another process deletes as well
            for folder in sorted(self.place.parent.iterdir(), key=lambda f: f.stat().st_mtime, reverse=True):
                rest -= sum(file.stat().st_size for file in folder.iterdir())
                if rest < 0:
                    shutil.rmtree(folder, ignore_errors=True)


def _drawing(denoiser: Denoiser) -> tuple[str, dict[str, np.ndarray | torch.Tensor]]:
    """What decides on what a denoiser draws, beside its network: a text, and arrays by name."""
    arrays: dict[str, np.ndarray | torch.Tensor] = {f"example {n}": t for n, t in (denoiser.examples or {}).items()}
    if denoiser.text is not None:
        arrays |= {"words": denoiser.text.words, "positions": denoiser.text.positions}
    if (given := denoiser.given) is not None:
        arrays |= {f"given {name}": value for name, value in given.values.items()}
        arrays |= {f"null {name}": value for name, value in (given.null or {}).items()}
    return f"{denoiser.sampling()} {denoiser.guidance}", arrays
