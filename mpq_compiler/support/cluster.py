"""What a cluster is, and how the one at an address is found: machines that run tasks in place of threads.

The built-in kind is Ray's (`support.ray_cluster`); others are entry points of the group `mpq_compiler.clusters`, each a
`Kind` by the scheme of its addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from mpq_compiler.support import plugins
from mpq_compiler.support.errors import UserError, nearest

if TYPE_CHECKING:  # the help of commands imports this module, and nothing heavy
    import numpy as np

ENTRY_POINTS = "mpq_compiler.clusters"
RAY = "ray"
"""The kind of addresses without a scheme."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Shared = TypeVar("_Shared")
Large = TypeVar("Large")


def unheard(item: object, result: object) -> None:
    """Hears of the end of a task, and does nothing."""


class Cluster(Protocol):
    """Machines that run tasks."""

    def run(
        self,
        task: Callable[[_Shared, _Item], _Result],
        shared: _Shared,
        items: Iterable[_Item],
        ended: Callable[[_Item, _Result], None] = unheard,
    ) -> list[_Result]:
        """What `execution.RunContext.tasks` gives."""


@dataclass(frozen=True)
class Shipping(Generic[Large]):
    """How values become bytes, and what must be alike on all machines (`ir.parcels.SHIPPING`): functions by name."""

    pack: Callable[[object], tuple[bytes, Sequence[Large]]]
    """The stream of a value, and the large tensors that lie beside it."""
    memory: Callable[[Large], np.ndarray]
    """The bytes of a large tensor, u8 [N]."""
    unpack: Callable[[bytes, Sequence[np.ndarray], bool], object]
    """The value; its large tensors are copied, or read the given bytes in place (false)."""
    prepare: Callable[[], None]
    """Makes a process ready for tasks."""
    identity: Callable[[], dict[str, str]]
    """What the bits of results depend on, by name."""


class Kind(Protocol):
    """An entry point: the clusters with addresses of one scheme. A module can be one."""

    def require(self, address: str) -> None:
        """UserError: the whole address is none, or nothing answers there. It takes little time."""

    def connect(self, address: str, shipping: Shipping[Large], jobs: int) -> AbstractContextManager[Cluster]:
        """Opens the cluster. UserError: it cannot be reached, or its machines would give other bits than this one.

        jobs: processes, where the address is of this machine.
        """


@contextmanager
def connected(address: str | None, shipping: Shipping[Large], jobs: int) -> Iterator[Cluster | None]:
    """Opens the cluster at an address, for the length of the block; None gives None.

    Raises:
        UserError: no cluster has such an address, what it needs is not installed, or it cannot be used.
    """
    require(address)
    if address is None:
        yield None
    else:
        with kind_of(address).connect(address, shipping, jobs) as cluster:
            yield cluster


def require(address: str | None) -> None:
    """UserError: no cluster is at the address, as far as can be known in little time."""
    if address is not None:
        kind_of(address).require(address)


def kind_of(address: str) -> Kind:
    """The kind of cluster at an address. UserError: there is none, or it needs a missing package."""
    scheme, separator, _ = address.partition("://")
    name = scheme if separator or ":" not in address else RAY
    entry = plugins.find(ENTRY_POINTS, name)
    if entry is None:
        known = (e.name for e in (*plugins.built_in(ENTRY_POINTS), *plugins.of(ENTRY_POINTS)))
        raise UserError(
            f"--distributed '{address}' names no cluster ({nearest(name, known)}): give 'ray' for processes of this "
            "machine, or ray://HOST:PORT or HOST:PORT of a Ray cluster"
        )
    try:
        kind: Kind = entry.load()
    except ModuleNotFoundError as error:
        raise UserError(
            f"--distributed {address} needs {error.name}, which is not installed: "
            f"pip install '{plugins.requirement(entry)}'"
        ) from error
    return kind
