"""Kinds of calls that an artifact takes: their inputs, and the functions that were compiled for sizes and batches."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from mpq_compiler.artifact.manifest import Function
from mpq_compiler.artifact.manifest import Value as InputValue
from mpq_compiler.runtime.values import converted
from mpq_compiler.sampling.call_tree import CallForm, NoSuchCall, Value
from mpq_compiler.support.errors import UserError, nearest


class Fitted(NamedTuple):
    """Checked inputs of a call, the batch size, and the functions that take them."""

    arrays: Mapping[str, np.ndarray]
    batch: int
    functions: list[Function]


def output_shape(functions: Sequence[Function]) -> tuple[int, ...]:
    """The shape of the output of a sample, by the functions that take a call; others are for other sizes."""
    return tuple(int(extent or 0) for extent in functions[0]["output"]["shape"][1:])


@dataclass(frozen=True)
class Kind:
    """A kind of calls that an artifact takes; there is one, without a form, where a model is called by its inputs."""

    text: str
    form: CallForm | None
    functions: list[Function]
    _known: dict[tuple[tuple[int, ...], ...], tuple[int, list[Function]]] = field(default_factory=dict, compare=False)
    """The batch and the functions by the shapes of inputs that came before."""

    @cached_property
    def inputs(self) -> dict[str, InputValue]:
        """The inputs of its functions by name."""
        return {value["name"]: value for value in self.functions[0]["inputs"]}

    def fitted(self, inputs: Mapping[str, Value], devices: Collection[str]) -> Fitted:
        """The inputs of a call as arrays, and the functions that take them.

        Args:
            inputs: arrays, torch tensors or numbers by name.
            devices: the types of torch devices that they may be on.

        Raises:
            NoSuchCall: they are none of this kind.
            UserError: inputs without a sample, of different batches, or of other types.
        """
        arrays = self._arrays(inputs, devices)
        shapes = tuple(array.shape for array in arrays.values())
        if (known := self._known.get(shapes)) is None:
            known = self._known[shapes] = self._functions_for(arrays)
        return Fitted(arrays, *known)

    def _arrays(self, inputs: Mapping[str, Value], devices: Collection[str]) -> dict[str, np.ndarray]:
        taken = self.inputs
        for name in inputs:
            if name not in taken:
                raise NoSuchCall(f"this artifact has no input '{name}': {nearest(name, taken)}")
        for name in taken:
            if name not in inputs:
                raise NoSuchCall(f"input '{name}' is missing; this artifact takes {', '.join(taken)}")
        arrays = {name: converted(name, inputs[name], value, devices) for name, value in taken.items()}
        batch = max((len(array) for array in arrays.values() if array.ndim), default=1)
        for name, value in taken.items():
            array = arrays[name]
            if len(value["shape"]) == 1 and array.size == 1:
                arrays[name] = array = np.broadcast_to(array.reshape(1), (batch,))
            if array.ndim != len(value["shape"]):
                shape = _shape_text(value["shape"])
                raise NoSuchCall(f"input '{name}' has shape {list(array.shape)}; this artifact takes {shape}")
        return arrays

    def _functions_for(self, arrays: Mapping[str, np.ndarray]) -> tuple[int, list[Function]]:
        first = next(iter(arrays))
        batch = len(arrays[first])
        for name, array in arrays.items():
            if array.size == 0:
                raise UserError(
                    f"input '{name}' is empty, of shape {list(array.shape)}; a batch needs a sample"
                )
            if len(array) != batch:
                raise UserError(f"input '{name}' has a batch of {len(array)}, and '{first}' one of {batch}")
        found = self.functions
        for name, array in arrays.items():
            shapes = {f["name"]: _shape(f, name) for f in found}
            found = [f for f in found if shapes[f["name"]][1:] == array.shape[1:]]
            if not found:
                known = " or ".join(sorted({_shape_text(shape) for shape in shapes.values()}))
                raise NoSuchCall(f"input '{name}' has shape {list(array.shape)}; this artifact takes {known}")
        return batch, found


def kinds_of(manifest: Mapping[str, Any]) -> list[Kind]:
    """The kinds of calls of an artifact; functions for steps that keep or reuse values are of none."""
    reuse = manifest.get("reuse", {})
    others = {*reuse.get("keeping", ()), *reuse.get("reusing", ())}
    functions = {function["name"]: function for function in manifest["functions"] if function["name"] not in others}
    calls = manifest["model"].get("calls", ())
    found = [Kind(c["text"], CallForm.from_json(c["form"]), [functions[n] for n in c["functions"]]) for c in calls]
    return found or [Kind("", None, [*functions.values()])]


def parts_of(batch: int, functions: Sequence[Function]) -> list[tuple[Function, int, int]]:
    """Splits a batch among functions, the largest that fit first: (function, first sample, end) of each part."""
    sized: list[tuple[int, Function]] = []
    for function in functions:
        if function["batch"] is None:
            return [(function, 0, batch)]
        sized.append((function["batch"], function))
    by_size = sorted(sized, key=lambda each: -each[0])
    schedule = []
    begin = 0
    while begin < batch:
        rest = batch - begin
        size, function = next((each for each in by_size if each[0] <= rest), by_size[-1])
        end = min(begin + size, batch)
        schedule.append((function, begin, end))
        begin = end
    return schedule


def _shape(function: Function, name: str) -> tuple[int | None, ...]:
    return next(tuple(value["shape"]) for value in function["inputs"] if value["name"] == name)


def _shape_text(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join(["B", *map(str, shape[1:])]) + "]"
