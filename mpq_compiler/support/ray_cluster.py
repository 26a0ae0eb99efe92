"""Tasks on the machines of a Ray cluster, a kind of `support.cluster`.

Large tensors lie in Ray's object store, once a machine, where all of its processes read them in place. Ray calls a task
again whose process or machine dies; nothing else is lost.
"""

from __future__ import annotations

import os
import re
import socket
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Generic, TypeVar, cast

import numpy as np
import ray
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mpq_compiler.support.cluster import Large, Shipping, unheard
from mpq_compiler.support.errors import UserError

LOCAL = "ray"
"""The address that starts Ray on this machine."""
ANSWER = 10.0
"""Seconds in which a cluster answers."""
START = 120.0
"""Seconds in which each machine starts a process and imports what tasks need."""
RETRIES = 5
"""How often a task is called again whose process or machine dies."""
AHEAD = 2
"""The items for each CPU that are sent ahead: enough to keep it busy, and few, as their tensors take memory."""
LOOK = 10.0
"""Seconds between two looks at whether a cluster that gives no results has machines left."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Shared = TypeVar("_Shared")
_Sent = tuple[bytes, "list[ray.ObjectRef[np.ndarray]]"]
"""A packed value: its stream, and its large tensors in the object store."""


def require(address: str) -> None:
    """UserError: the address is none, or no cluster answers there; Ray itself would try for minutes."""
    if address == LOCAL:
        return
    found = re.fullmatch(r"(?:ray://)?([^:/\s]+):(\d{1,5})", address)
    if found is None or not 0 < int(found[2]) < 1 << 16:
        raise UserError(
            f"--distributed '{address}' is no address: give ray://HOST:PORT or HOST:PORT, as `ray start --head` prints "
            "them, or 'ray' for processes of this machine"
        )
    try:
        with socket.create_connection((found[1], int(found[2])), ANSWER) as stream:
            spoken = os.environ.get("RAY_USE_TLS", "0") != "0" or _speaks_http2(stream)
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error.strerror or error}): check host and port, and that "
            "`ray start --head` runs there"
        ) from error
    if not spoken:
        raise UserError(
            f"what answers at {address} is no Ray cluster: `ray start --head` prints the port for HOST:PORT, and that "
            "for ray://HOST:PORT is 10001"
        )


def _speaks_http2(stream: socket.socket) -> bool:
    """Whether a server answers the preface of HTTP/2 (RFC 9113, section 3.4) with its settings, as gRPC's do."""
    stream.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    try:
        frame = stream.recv(9)
    except TimeoutError:
        return False
    return len(frame) == 9 and frame[3] == 4


@contextmanager
def connect(address: str, shipping: Shipping[Large], jobs: int) -> Iterator[RayCluster[Large]]:
    """Connects to a Ray cluster, or starts one on this machine and ends it with the block (`cluster.Kind`)."""
    mine = not ray.is_initialized()  # a program may have its own connection, which it keeps
    if mine:
        _init(address, jobs)
    try:
        found = RayCluster(shipping)
        if address != LOCAL:
            found.require_alike()
        yield found
    finally:
        if mine:
            ray.shutdown()


def _init(address: str, jobs: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = {"num_cpus": jobs, "include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init("local" if local else address, logging_level="error", log_to_driver=False, **local)
    except Exception as error:  # of many kinds: RuntimeError, ConnectionError, ValueError, gRPC's
        lines = str(error).strip().splitlines() or [type(error).__name__]
        text = " ".join(" ".join(lines[-1:] if "Traceback" in str(error) else lines).split())[:200]
        if local:
            raise UserError(f"Ray cannot be started on this machine: {text}") from error
        if "version" in text.lower() and "python" in text.lower():
            raise UserError(
                f"the cluster at {address} has another version of Ray or Python than this machine with its Ray "
                f"{ray.__version__}: install the same on all ({text})"
            ) from error
        raise UserError(
            f"Ray cannot connect to {address} ({text}): give HOST:PORT on a machine of the cluster, elsewhere "
            "ray://HOST:PORT with the port of Ray's client server (10001); a cluster with a token wants it here, with "
            "RAY_AUTH_MODE=token"
        ) from error


class RayCluster(Generic[Large]):
    """A cluster that is connected (`cluster.Cluster`)."""

    def __init__(self, shipping: Shipping[Large]) -> None:
        self._shipping = shipping
        self._identity = shipping.identity()
        self._call = ray.remote(num_cpus=1, max_retries=RETRIES)(_call)
        self._known: dict[tuple[int, int], tuple[weakref.ref[Large], ray.ObjectRef[np.ndarray]]] = {}
        """What lies in the object store as long as the tensor lives here, by its identity and version."""

    def require_alike(self) -> None:
        """UserError: a machine of the cluster would give other bits, or cannot run tasks at all."""
        asked = {}
        for node in ray.nodes():
            if node["Alive"] and node["Resources"].get("CPU"):
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                ask = ray.remote(num_cpus=0, max_retries=RETRIES)(_identify).options(scheduling_strategy=there)
                asked[ask.remote(self._shipping)] = node["NodeManagerAddress"]
        if not asked:
            raise UserError("the cluster has no machine with a CPU for tasks: start one with `ray start --address`")
        for answer, machine in asked.items():
            try:
                identity = ray.get(answer, timeout=START)
            except exceptions.RayError as error:
                said = str(error).strip().splitlines()[-1:] or [type(error).__name__]
                raise UserError(
                    f"the machine {machine} of the cluster cannot run tasks ({said[0][:200]}): install mpq-compiler "
                    "there as it is here, pip install 'mpq-compiler[compile,ray]'"
                ) from error
            _require_same(identity, self._identity, machine)

    def run(
        self,
        task: Callable[[_Shared, _Item], _Result],
        shared: _Shared,
        items: Iterable[_Item],
        ended: Callable[[_Item, _Result], None] = unheard,
    ) -> list[_Result]:
        """Calls ``task(shared, item)`` for every item on the cluster (`RunContext.tasks`).

        Where one fails, the few that were sent ahead go on until they or the connection end. They are not cancelled: in
        Ray that races with their own ends, and now and then aborts this process (`submissible_tasks_`, in 2.60 still).
        """
        waiting: dict[ray.ObjectRef[_Packed], tuple[int, _Item]] = {}
        results: dict[int, _Result] = {}
        left = enumerate(items)
        try:
            common = ray.put(self._sent(shared))
            while True:
                for index, item in islice(left, max(0, self._ahead() - len(waiting))):
                    sent = self._sent(item)
                    waiting[self._call.remote(self._shipping, self._identity, task, [common], sent)] = index, item
                if not waiting:
                    return [results[index] for index in range(len(results))]
                done, _ = ray.wait([*waiting], timeout=LOOK)
                for ref in done:
                    stream, large = ray.get(ref)
                    index, item = waiting.pop(ref)
                    results[index] = cast(_Result, self._shipping.unpack(stream, large, True))
                    ended(item, results[index])
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except (exceptions.RayError, ConnectionError) as error:
            raise UserError(
                f"the cluster gave a task up ({type(error).__name__}): it was called {1 + RETRIES} times where its "
                "process or machine died, for lack of memory perhaps; give machines more, or fewer CPUs (`ray start "
                "--num-cpus`)"
            ) from error

    def _ahead(self) -> int:
        """The most items that are sent and have not come back. UserError: no machine is left."""
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if not cpus:
            raise UserError("no machine of the cluster is left: start it anew, and run the same command again")
        return AHEAD * cpus

    def _sent(self, value: object) -> _Sent:
        stream, large = self._shipping.pack(value)
        return stream, [self._stored(one) for one in large]

    def _stored(self, large: Large) -> ray.ObjectRef[np.ndarray]:
        """The tensor in the object store; each is put there once."""
        key = id(large), int(getattr(large, "_version", 0))
        if key not in self._known:
            gone = weakref.ref(large, lambda _: self._known.pop(key, None))
            self._known[key] = gone, ray.put(self._shipping.memory(large))
        return self._known[key][1]


_Packed = tuple[bytes, Sequence[np.ndarray]]
"""A packed result, with its large tensors."""


def _identify(shipping: Shipping[Large]) -> dict[str, str]:
    return shipping.identity()


def _require_same(identity: dict[str, str], wanted: dict[str, str], machine: str) -> None:
    for name, value in wanted.items():
        if identity.get(name) != value:
            raise UserError(
                f"the machine {machine} of the cluster has {name} {identity.get(name)}, this one {value}, which would "
                "give other bits: use machines that are alike, with the same versions installed"
            )


_opened: dict[str, object] = {}
"""The shared value of this process's last task, by the id of its object."""


def _call(
    shipping: Shipping[Large],
    identity: dict[str, str],
    task: Callable[[object, object], object],
    shared: list[ray.ObjectRef[_Sent]],
    item: _Sent,
) -> _Packed:
    """Calls a task, in a process of the cluster. UserError: the process would give other bits."""
    (common,) = shared
    if common.hex() not in _opened:
        _require_same(shipping.identity(), identity, ray.util.get_node_ip_address())  # one that joined later
        shipping.prepare()
        _opened.clear()  # before the next one is read
        _opened[common.hex()] = _open(shipping, ray.get(common))
    stream, large = shipping.pack(task(_opened[common.hex()], _open(shipping, item)))
    return stream, [shipping.memory(one) for one in large]


def _open(shipping: Shipping[Large], sent: _Sent) -> object:
    stream, refs = sent
    return shipping.unpack(stream, ray.get(refs), False)
