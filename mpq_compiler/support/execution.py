"""How work is run: in batches, by as many threads as there are jobs, with a bar for what takes its time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

BATCH = 32

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Rows(Protocol):
    """An array or tensor whose first dimension is the sample."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Self: ...


_Rows = TypeVar("_Rows", bound=Rows)


def batches(inputs: Mapping[str, _Rows], size: int = BATCH) -> Iterator[dict[str, _Rows]]:
    """The inputs, so many samples at a time."""
    count = len(next(iter(inputs.values())))
    for start in range(0, count, size):
        yield {name: value[start : start + size] for name, value in inputs.items()}


@dataclass(kw_only=True)
class RunContext:
    """What decides how work is run, and nothing of what it gives but by the seed."""

    seed: int = 0
    jobs: int = 1
    cache: Path | None = None
    progress: Callable[[str, int], AbstractContextManager[Callable[..., None]]] | None = None
    """``with progress("sensitivity", total) as advance: advance(1)``: a bar for work of more than two seconds.

    ``advance(1, "12.3 dB")`` says how it goes besides.
    """

    def track(self, title: str, total: int) -> AbstractContextManager[Callable[..., None]]:
        """The bar of a piece of work, or none where nobody watches."""
        return self.progress(title, total) if self.progress else nullcontext(lambda n, said="": None)

    def map(self, work: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        """``work`` of every item, by as many threads as there are jobs, in order; an error or Ctrl-C drops the rest."""
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
