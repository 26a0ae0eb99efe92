"""A cluster without machines: what tasks take and give goes through parcels, in this process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from typing import Any

from mpq_compiler.ir import parcels
from mpq_compiler.support.cluster import unheard


class Post:
    """Runs tasks backwards, each on copies of its own; `tasks` has their names."""

    def __init__(self) -> None:
        self.tasks: list[str] = []

    def run(
        self,
        task: Callable[[Any, Any], Any],
        shared: Any,
        items: Iterable[Any],
        ended: Callable[[Any, Any], None] = unheard,
    ) -> list[Any]:
        assert pickle.loads(pickle.dumps(task)) is task
        found: dict[int, Any] = {}
        for index, item in reversed([*enumerate(items)]):
            self.tasks.append(task.__name__)
            found[index] = sent(task(sent(shared), sent(item)), True)
            ended(item, found[index])
        return [found[index] for index in range(len(found))]


def sent(value: Any, copy: bool = False) -> Any:
    """The value as it arrives elsewhere."""
    stream, large = parcels.pack(value)
    return parcels.unpack(stream, [parcels.memory(one) for one in large], copy)
