"""`Facts`: what passes found out for later ones, by keys that know the type of their value.

A key is declared where the type of its value lives, and its name is that of the pass or property that provides it::

    CALIBRATION = Fact[Calibration]("calibration")
    program.facts[CALIBRATION].timesteps
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")
D = TypeVar("D")


@dataclass(frozen=True)
class Fact(Generic[T]):
    """The key of a fact whose value has the type ``T``. Keys of one name are equal."""

    name: str


class Facts:
    """A small mapping from `Fact` to values, each of its key's type.

    Copies share the values, so a pass that changes a fact replaces its value and never writes into it. Names in place
    of keys work for one release, with a DeprecationWarning.
    """

    def __init__(self, known: Facts | Mapping[Fact[Any], Any] | None = None) -> None:
        self._known: dict[str, Any] = {}
        self |= known or {}

    def __getitem__(self, fact: Fact[T]) -> T:
        value: T = self._known[_name(fact)]
        return value

    def __setitem__(self, fact: Fact[T], value: T) -> None:
        self._known[_name(fact)] = value

    def __delitem__(self, fact: Fact[Any]) -> None:
        del self._known[_name(fact)]

    def __contains__(self, fact: Fact[Any]) -> bool:
        return _name(fact) in self._known

    def __iter__(self) -> Iterator[Fact[Any]]:
        return map(Fact, self._known)

    def __len__(self) -> int:
        return len(self._known)

    def __ior__(self, other: Facts | Mapping[Fact[Any], Any]) -> Facts:
        self._known |= other._known if isinstance(other, Facts) else {_name(fact): other[fact] for fact in other}
        return self

    def __repr__(self) -> str:
        return f"Facts({self._known!r})"

    @overload
    def get(self, fact: Fact[T]) -> T | None: ...

    @overload
    def get(self, fact: Fact[T], default: T) -> T: ...

    @overload
    def get(self, fact: Fact[T], default: D) -> T | D: ...

    def get(self, fact: Fact[Any], default: Any = None) -> Any:
        return self._known.get(_name(fact), default)

    def clear(self) -> None:
        self._known.clear()

    def setdefault(self, fact: Fact[T], value: T) -> T:
        found: T = self._known.setdefault(_name(fact), value)
        return found

    def pop(self, fact: Fact[T], default: D) -> T | D:
        """Removes a fact and returns it; ``default`` where it is not known."""
        found: T | D = self._known.pop(_name(fact), default)
        return found


def _name(fact: Fact[Any] | str) -> str:
    if isinstance(fact, Fact):
        return fact.name
    warnings.warn(
        f"facts are known by typed keys (mpq_compiler.ir.facts.Fact), no longer by names such as {fact!r}",
        DeprecationWarning,
        stacklevel=3,
    )
    return fact
