"""How work is run: in batches, on as many threads as there are jobs, with a progress bar for what takes long."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from mpq_compiler.support.cluster import Cluster, unheard
from mpq_compiler.support.errors import UserError

BATCH = 32
"""Samples that the model sees at a time, unless a caller says otherwise."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Shared = TypeVar("_Shared")


class Rows(Protocol):
    """An array or tensor whose first dimension is the sample."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Self: ...


_Rows = TypeVar("_Rows", bound=Rows)


def batches(inputs: Mapping[str, _Rows], size: int = BATCH) -> Iterator[dict[str, _Rows]]:
    """Splits the inputs into batches of at most ``size`` samples, in order."""
    count = len(next(iter(inputs.values())))
    for start in range(0, count, size):
        yield {name: value[start : start + size] for name, value in inputs.items()}


def require_counts(**counts: int) -> None:
    """UserError, by the name of the option, where a count is less than 1: jobs, samples of a call, rounds."""
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"--{name} {value} must be 1 or more")


def child_environment(**more: str) -> dict[str, str]:
    """Makes the environment in which a child process imports this very package, from wherever this one has it."""
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | more


def require_threads(threads: int | None) -> None:
    """UserError where an artifact is to be called with less than 1 thread. None: it decides by itself."""
    if threads is not None and threads < 1:
        raise UserError(f"threads is {threads}; it must be at least 1")


@dataclass(kw_only=True)
class RunContext:
    """Settings of a run: they decide how work is done; of these the seed changes the results, the device last bits."""

    seed: int = 0
    jobs: int = 1
    cache: Path | None = None
    progress: Callable[[str, int], AbstractContextManager[Callable[..., None]]] | None = None
    """Opens a progress bar for a pass, or for work of more than two seconds within it; None shows no bars.

    Used as ``with progress("calibrating", total) as advance: advance(1)``. ``advance(1, "12.3 dB")`` shows the text
    beside the bar. A pass has a total of 1.
    """
    reused: dict[str, float] = field(default_factory=dict)
    """What an earlier run had left in the cache, and the CPU seconds that it took there, where they are known."""
    device: str = "cpu"
    """Where torch runs the model: "cpu", or a GPU such as "cuda:0"."""
    cluster: Cluster | None = None
    """Where `tasks` run; None: on the threads of this process."""

    def reuse(self, what: str, seconds: float = 0.0) -> None:
        """Notes what the cache had, and the CPU seconds that it took where they are known."""
        self.reused[what] = self.reused.get(what, 0.0) + seconds

    def track(self, title: str, total: int) -> AbstractContextManager[Callable[..., None]]:
        """Opens the progress bar of a piece of work; without `progress` the updates go nowhere."""
        return tracked(self.progress, title, total)

    def map(self, work: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        """Applies ``work`` to every item on `jobs` threads and returns the results in the order of the items.

        An error or Ctrl-C cancels the items that have not begun.
        """
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def tasks(
        self,
        task: Callable[[_Shared, _Item], _Result],
        shared: _Shared,
        items: Iterable[_Item],
        ended: Callable[[_Item, _Result], None] = unheard,
    ) -> list[_Result]:
        """Calls ``task(shared, item)`` for every item, here or on a cluster; the results are in the items' order.

        An error or Ctrl-C cancels the items that have not begun.

        Args:
            task: a function of a module. It returns all that it found out: what it writes elsewhere may be lost, and a
                task whose machine dies is called again.
            shared: what all tasks read and none changes; it goes to each machine once.
            items: each goes to one machine. They are taken as machines become free.
            ended: is called in this thread with item and result as each task ends, in no certain order.
        """
        if self.cluster is not None:
            return self.cluster.run(task, shared, items, ended)
        with ThreadPoolExecutor(self.jobs) as pool:
            known = {pool.submit(task, shared, item): item for item in items}
            try:
                for future in as_completed(known):
                    ended(known[future], future.result())
                return [future.result() for future in known]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def tracked(
    progress: Callable[[str, int], AbstractContextManager[Callable[..., None]]] | None, title: str, total: int
) -> AbstractContextManager[Callable[..., None]]:
    """Opens a progress bar for ``total`` units of work; without ``progress`` the updates go nowhere."""
    return progress(title, total) if progress else nullcontext(lambda n, said="": None)
