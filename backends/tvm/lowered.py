"""A denoiser as a list of kernel calls: plain data between the emitter (torch) and its workers (TVM)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

BATCH = "B"
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Record:
    """A call of a class or function of `kernels/`, such as ``norms.GroupNorm``, with its arguments by name.

    The problem of a kernel as data: made without importing TVM, compared, hashed and sent to a worker.
    """

    type: str
    fields: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        inner = ", ".join(f"{name}={_text(value)}" for name, value in self.fields)
        return f"{self.type.rsplit('.', 1)[-1]}({inner})"

    def get(self, name: str) -> Any:
        return dict(self.fields)[name]

    def replace(self, **changes: Any) -> Record:
        return record(self.type, **{**dict(self.fields), **changes})


def record(type: str, **fields: Any) -> Record:
    """The record with hashable fields in a fixed order."""
    return Record(type, tuple(sorted((name, _frozen(value)) for name, value in fields.items())))


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_text(v) for v in value) + "]"
    return str(value)


@dataclass(frozen=True)
class Kernel:
    """A kernel: its template (a key of `templates.TEMPLATES`) and its problem. Equal kernels are compiled once."""

    template: str
    problem: Record

    @property
    def name(self) -> str:
        """Of its function, the same wherever it is compiled."""
        return f"{self.template}_{hashlib.sha256(str(self).encode()).hexdigest()[:16]}"

    def __str__(self) -> str:
        return f"{self.template} {self.problem}"


@dataclass(frozen=True)
class Value:
    """A tensor: name (of the node that makes it, or of the store), shape with "B" for the batch, element type."""

    name: str
    shape: Shape
    dtype: str

    @property
    def batched(self) -> bool:
        return self.shape[:1] == (BATCH,)

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape of a sample."""
        return tuple(int(d) for d in self.shape[self.batched :])

    @property
    def size(self) -> int:
        """Elements of a sample."""
        return math.prod(self.inner)


@dataclass(frozen=True)
class Call:
    """A kernel applied: names of values by the names of the kernel's arguments. `node` is for messages."""

    kernel: Kernel
    operands: tuple[tuple[str, str], ...]
    results: tuple[tuple[str, str], ...]
    node: str


@dataclass(frozen=True)
class Lowered:
    """The functions ``prepare(stored...) -> prepared`` and, for every batch size, ``denoise(inputs..., prepared...)``.

    values:    every value by name but those that `prepare` alone makes and reads
    prepared:  names of the values that the denoiser reads and `prepare` makes or hands on
    """

    inputs: tuple[Value, ...]
    stored: tuple[Value, ...]
    preparation: tuple[Call, ...]
    prepared: tuple[str, ...]
    calls: tuple[Call, ...]
    output: Value
    batches: tuple[int, ...] = field(default=(1,))

    def kernels(self) -> dict[Kernel, str]:
        """The kernels, each with the node that asks for it first."""
        found: dict[Kernel, str] = {}
        for call in self._all():
            found.setdefault(call.kernel, call.node)
        return found

    def _all(self) -> Iterator[Call]:
        yield from self.preparation
        yield from self.calls
