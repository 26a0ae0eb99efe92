"""Inputs whose values decide what a model computes, as masks of text lengths do; a graph has no such decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

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


class _Deciding(TorchDispatchMode):
    """Notices which inputs' values decide what a model computes: numbers that its code reads, and sizes of results."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()
        self._sources = WeakTensorKeyDictionary()
        for name, value in inputs.items():
            self._sources[value] = {name}

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        sources = self._of(given)
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        if sources and not tags.isdisjoint(func.tags):
            self.found |= self._of(args[1:]) if func is aten.index.Tensor else sources
        output = func(*args, **(kwargs or {}))
        changed = given[:1] if func._schema.is_mutable else []
        for leaf in [*pytree.tree_leaves(output), *changed] if sources else []:
            if isinstance(leaf, Tensor):
                self._sources[leaf] = self._sources.get(leaf, set()) | sources
        return output

    def read(self, tensor: object) -> None:
        """Notes that code reads the numbers of a tensor."""
        self.found |= self._of(tensor)

    def _of(self, values: object) -> set[str]:
        leaves = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
        return set().union(*(self._sources.get(leaf, set()) for leaf in leaves))


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
