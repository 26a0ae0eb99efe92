"""Watches the operators that a model runs."""

from __future__ import annotations

from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Watching(TorchDispatchMode):
    """Shows every operator that runs to `saw`, with what it was given and what it gave."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        output = func(*args, **(kwargs or {}))
        self.saw(func, args, tensors_of((args, kwargs)), output)
        return output

    def saw(self, func: OpOverload, args: tuple[object, ...], given: list[Tensor], output: object) -> None:
        """Takes an operator, its positional arguments, the tensors among all of them, and its result."""
        raise NotImplementedError


def tensors_of(values: object) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
