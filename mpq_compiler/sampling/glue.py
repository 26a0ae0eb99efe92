"""Glue: what a pipeline computes between its parts, such as the scale of latents before they are decoded, in NumPy.

It is a short list of tensor operators, by the names that torch has for them, and plain JSON data in an artifact:

>>> glue = Glue(("latents",), (Step("div", (Ref(0), 0.18215)),), {"z": 1})
>>> glue(latents=np.ones((1, 4, 8, 8), np.float32))["z"]

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from mpq_compiler.sampling.call_tree import Value
from mpq_compiler.support.errors import UserError

Array = np.ndarray


class GlueData(TypedDict):
    """Glue as plain data: each step is the operator's name and its arguments, ``{"of": index}`` for a value."""

    sources: list[str]
    steps: list[list[Value]]
    results: dict[str, int]


@dataclass(frozen=True)
class Ref:
    """A value that was given or made: sources first, then the results of the steps in their order."""

    index: int


@dataclass(frozen=True)
class Step:
    """One operator: its name in torch without the overload, and its arguments in torch's order.

    An argument is a `Ref`, a number, the name of a type, None, or a list of them.
    """

    op: str
    args: tuple[Value, ...]


@dataclass(frozen=True)
class Glue:
    """What a pipeline computes between parts: results by name, of sources by name."""

    sources: tuple[str, ...]
    steps: tuple[Step, ...]
    results: Mapping[str, int]
    """The value of each result (`Ref.index`)."""

    def __call__(self, **given: Array) -> dict[str, Array]:
        """The results by name. UserError: a source is missing."""
        if missing := [name for name in self.sources if name not in given]:
            raise UserError(f"'{missing[0]}' is missing, of which {', '.join(self.results)} is made")
        values: list[Value] = [np.asanyarray(given[name]) for name in self.sources]
        for step in self.steps:
            values.append(OPERATORS[step.op](*(_resolved(arg, values) for arg in step.args)))
        return {name: values[index] for name, index in self.results.items()}

    def to_json(self) -> GlueData:
        """Plain data, which `from_json` reads."""
        return {
            "sources": list(self.sources),
            "steps": [[step.op, *(_encoded(arg) for arg in step.args)] for step in self.steps],
            "results": dict(self.results),
        }

    @classmethod
    def from_json(cls, data: GlueData) -> Glue:
        """Glue from plain data. UserError: it has an operator that is not known here."""
        steps = tuple(Step(op, tuple(_decoded(arg) for arg in args)) for op, *args in data["steps"])
        if unknown := [step.op for step in steps if step.op not in OPERATORS]:
            raise UserError(f"the pipeline computes '{unknown[0]}' between its parts, which is not known here: update")
        return cls(tuple(data["sources"]), steps, dict(data["results"]))


def _resolved(arg: Value, values: Sequence[Value]) -> Value:
    if isinstance(arg, Ref):
        return values[arg.index]
    return [_resolved(part, values) for part in arg] if isinstance(arg, list | tuple) else arg


def _encoded(arg: Value) -> Value:
    if isinstance(arg, Ref):
        return {"of": arg.index}
    return [_encoded(part) for part in arg] if isinstance(arg, list | tuple) else arg


def _decoded(arg: Value) -> Value:
    if isinstance(arg, dict):
        return Ref(arg["of"])
    return [_decoded(part) for part in arg] if isinstance(arg, list) else arg


# ------------------------------------------------------------------------------------ the operators, as torch has them


def _f32(value: Value) -> Value:
    """A Python number in the type of the tensors beside it, as torch takes it: numbers do not widen them."""
    return np.float32(value) if isinstance(value, float) else value


def _view(x: Array, sizes: Sequence[int]) -> Array:
    return x.reshape(sizes)


def _expand(x: Array, sizes: Sequence[int], implicit: bool = False) -> Array:
    ahead = len(sizes) - x.ndim
    shape = [x.shape[i - ahead] if size == -1 else size for i, size in enumerate(sizes)]
    return np.broadcast_to(x, shape)


def _slice(x: Array, axis: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Array:
    places = [slice(None)] * x.ndim
    places[axis] = slice(start, end, step)
    return x[tuple(places)]


def _squeeze(x: Array, *axes: Value) -> Array:
    chosen = axes[0] if axes else [i for i, size in enumerate(x.shape) if size == 1]
    chosen = [chosen] if isinstance(chosen, int) else chosen
    return np.squeeze(x, tuple(axis for axis in chosen if x.shape[axis] == 1))


def _clamp(x: Array, low: float | None = None, high: float | None = None) -> Array:
    clamped: Array = np.clip(x, _f32(low), _f32(high))
    return clamped


def _cast(x: Array, dtype: str) -> Array:
    return x.astype(dtype)


def _split(x: Array, size: int | Sequence[int], axis: int = 0) -> list[Array]:
    ends = range(size, x.shape[axis], size) if isinstance(size, int) else np.cumsum(size)[:-1]
    return np.split(x, [*ends], axis)


def _pad(x: Array, amounts: Sequence[int], value: float = 0.0) -> Array:
    ahead = [(0, 0)] * (x.ndim - len(amounts) // 2)
    pairs = [*zip(amounts[::2], amounts[1::2], strict=True)][::-1]  # those of the last dimension come first
    return np.pad(x, ahead + pairs, constant_values=value)


def _scatter(x: Array, axis: int, index: Array, values: Array) -> Array:
    """Places rows by their numbers, which are a permutation."""
    rows = np.moveaxis(index, axis, 0).reshape(index.shape[axis], -1)[:, 0]
    if values.shape != x.shape or not np.array_equal(np.sort(rows), np.arange(x.shape[axis])):
        raise UserError("the pipeline places values between its parts in a way that is not known here")
    return np.take(values, np.argsort(rows), axis)


OPERATORS: dict[str, Callable[..., Value]] = {
    "add": lambda a, b: a + _f32(b),
    "array": lambda values, dtype: np.array(values, dtype),
    "clamp": _clamp,
    "constant_pad_nd": _pad,
    "cat": lambda parts, axis=0: np.concatenate(parts, axis),
    "cast": _cast,
    "div": lambda a, b: a / _f32(b),
    "expand": _expand,
    "getitem": lambda parts, index: parts[index],
    "mul": lambda a, b: a * _f32(b),
    "neg": np.negative,
    "ones_like": np.ones_like,
    "permute": lambda x, axes: np.transpose(x, axes),
    "repeat": lambda x, counts: np.tile(x, counts),
    "rsub": lambda a, b: _f32(b) - a,
    "scatter": _scatter,
    "select": lambda x, axis, index: np.take(x, index, axis),
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": lambda parts, axis=0: np.stack(parts, axis),
    "sub": lambda a, b: a - _f32(b),
    "t": np.transpose,
    "transpose": lambda x, a, b: np.swapaxes(x, a, b),
    "unbind": lambda x, axis=0: [*np.moveaxis(x, axis, 0)],
    "unsqueeze": lambda x, axis: np.expand_dims(x, axis),
    "view": _view,
    "zeros_like": np.zeros_like,
}
"""Operators by their names in torch."""
