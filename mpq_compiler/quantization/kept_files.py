"""What takes long, in the cache until its compilation has ended: where it is killed, the next one goes on.

Large results lie in files without names (`ir.scratch`) that go with the process; these have names and stay.
"""

from __future__ import annotations

import json
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from torch import Tensor

from mpq_compiler.ir import scratch
from mpq_compiler.support import cache
from mpq_compiler.support.usage import cpu_seconds

_logger = logging.getLogger(__name__)
LEAST_SECONDS = 30.0
"""The CPU seconds from which on a result is kept."""
ABOUT = "about"
"""The metadata of a file of tensors."""
SPARED = 2.0
"""How much more room than a result takes has to be there; with less it is not kept."""

_Kept = TypeVar("_Kept")


class KeptFiles(ABC, Generic[_Kept]):
    """The files or folders of a run's results of one kind, each named by the digest of all that it depends on."""

    kind: ClassVar[str]
    """The folder in the cache (`cache.KINDS`)."""
    what: ClassVar[str]
    """The result, for a sentence."""

    def __init__(self, path: Path | None) -> None:
        """``path``: the cache folder; None takes the user's."""
        self.folder = cache.folder(path) / self.kind
        self.used: list[Path] = []

    def use(self, name: str) -> Path:
        """The place of a name, which `forget` deletes."""
        self.used.append(self.folder / name)
        return self.used[-1]

    def load(self, place: Path) -> tuple[_Kept, float] | None:
        """The result at a place, and the CPU seconds that it took; None where none is whole."""
        try:
            return self._loaded(place)
        except (FileNotFoundError, KeyError, ValueError, TypeError):
            return None

    @abstractmethod
    def _loaded(self, place: Path) -> tuple[_Kept, float]:
        """What `load` returns; raises where a part is missing, torn or of another form."""

    @abstractmethod
    def save(self, place: Path, result: _Kept, seconds: float) -> bool:
        """Writes a result; returns whether there was room for it. UserError: the cache cannot be written."""

    def known(
        self,
        place: Path,
        make: Callable[[], _Kept],
        reuse: Callable[[str, float], None],
        note: Callable[[str], None],
    ) -> _Kept:
        """The result that a run which was killed has left, or else a new one, kept where it took long.

        Args:
            place: of the result.
            make: makes a new one.
            reuse: gets what was left, and the CPU seconds that need not be spent again.
            note: gets a sentence where there is no room.
        """
        if (left := self.load(place)) is not None:
            reuse(self.what, left[1])
            _logger.info("%s is that of an earlier run, which took %.0f s of CPU time", self.what, left[1])
            return left[0]
        begin = cpu_seconds()
        made = make()
        seconds = cpu_seconds() - begin
        if seconds >= LEAST_SECONDS and not self.save(place, made, seconds):
            note(
                f"{self.what} was not kept for a run that would go on if this one is killed: '{self.folder}' has too "
                "little room, name another folder with --cache"
            )
        return made

    def forget(self) -> None:
        """Deletes the results of the run, which has ended."""
        for place in self.used:
            if place.is_dir():
                shutil.rmtree(place, ignore_errors=True)
            else:
                place.unlink(missing_ok=True)


def write_all(place: Path, files: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Writes files of tensors into a folder; returns whether there was room. UserError: it cannot be written."""
    size = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    cache.make(place)
    if shutil.disk_usage(place).free < SPARED * size:
        return False
    for name, tensors in files.items():
        write(place / name, tensors)
    return True


def write(path: Path, tensors: Mapping[str, Tensor], about: str = "") -> None:
    """Writes a file of tensors, and a text about them. UserError: it cannot be written."""
    from safetensors.torch import save

    cache.write(path, save({n: tensor.contiguous() for n, tensor in tensors.items()}, {ABOUT: about}))


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file that `write` wrote, as `tensors_of` reads them, and the text about them.

    Large tensors are copied to files without names, as those are that passes make.
    """
    tensors, about = tensors_of(path)
    return {name: scratch.kept(tensor) for name, tensor in tensors.items()}, about


def tensors_of(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file that `write` wrote, in memory, and the text about them.

    FileNotFoundError: there is none that is whole.
    """
    from safetensors.torch import load

    if (content := cache.read(path)) is None:
        raise FileNotFoundError(path)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return load(content), str(header["__metadata__"][ABOUT])
