"""Inputs whose values decide what a model computes, as masks of text lengths do; a graph has no such decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from mpq_compiler.frontend.watching import Watching, tensors_of

aten = torch.ops.aten
READ_WHOLE = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
"""Methods that read all numbers of a tensor where they lie, without an operator that a dispatcher sees."""


@torch.no_grad()
def deciding(module: torch.nn.Module, inputs: Mapping[str, Tensor]) -> set[str]:
    """Calls a module and names the inputs of which its code reads numbers, or takes the sizes of results."""
    copies = {name: value.clone() for name, value in inputs.items()}
    mode = _Deciding(copies)
    with mode, _Reads(mode):
        try:
            module(**copies)
        except NotImplementedError:  # an operator of a higher order, which a trace refuses
            return set()
    return mode.found


class _Deciding(Watching):
    """Notices which inputs' values decide what a model computes: numbers that its code reads, and sizes of results."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._sources = WeakTensorKeyDictionary()
        for name, value in inputs.items():
            self._sources[value] = {name}

    def saw(self, func: OpOverload, args: tuple[object, ...], given: list[Tensor], output: object) -> None:
        sources = self._of(given)
        if not sources:
            return
        if not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(func.tags):
            self.found |= self._of(_masks(args[1])) if func is aten.index.Tensor else sources
        changed = given[:1] if func._schema.is_mutable else []
        for tensor in [*tensors_of(output), *changed]:
            self._sources[tensor] = self._sources.get(tensor, set()) | sources

    def read(self, tensor: object) -> None:
        """Notes that code reads the numbers of a tensor."""
        self.found |= self._of(tensor)

    def _of(self, values: object) -> set[str]:
        return set().union(*(self._sources.get(tensor, set()) for tensor in tensors_of(values)))


def _masks(indices: object) -> list[Tensor]:
    """The indices that are masks: what they choose has another size for other values, unlike that of numbers."""
    return [index for index in tensors_of(indices) if index.dtype in (torch.bool, torch.uint8)]


class _Reads(TorchFunctionMode):
    """Tells of methods that read numbers where they lie."""

    def __init__(self, deciding: _Deciding) -> None:
        super().__init__()
        self.deciding = deciding

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func in READ_WHOLE:
            self.deciding.read(args[0])
        return func(*args, **(kwargs or {}))
