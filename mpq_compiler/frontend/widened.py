"""Parameters that stay in their checkpoint's file, in half precision, and are float32 to the code of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpq_compiler.ir.program import HALVES

LEAST = 1 << 20
"""The bytes from which on a parameter stays in its file: below, widening it anew for every call costs more."""


class Widened(Tensor):
    """A float32 tensor that holds the half-precision tensor of a file, and widens it for each operator that reads it.

    Widening is exact, so a model computes the same bits as with float32 parameters; memory holds one of them at a time.
    """

    stored: Tensor

    @staticmethod
    def __new__(cls, stored: Tensor) -> Widened:
        made: Widened = torch.Tensor._make_wrapper_subclass(
            cls, stored.shape, strides=stored.stride(), dtype=torch.float32, device=stored.device
        )
        made.stored = stored
        return made

    def __init__(self, stored: Tensor) -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Widened({list(self.shape)}, {self.stored.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func is torch.ops.aten.detach.default:  # as a module's own access to its parameters
            (held,) = args
            assert isinstance(held, Widened)
            return cls(held.stored)
        args, kwargs = pytree.tree_map_only(cls, lambda held: held.stored.float(), (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def held(tensor: Tensor) -> Tensor:
    """The tensor as a model holds it: a large one in half precision as it is, others in float32."""
    if not tensor.is_floating_point():
        return tensor
    return Widened(tensor) if tensor.dtype in HALVES and tensor.nbytes >= LEAST else tensor.float()


def widen(model: nn.Module) -> None:
    """Makes the parameters of a model float32 to its code; large ones stay in the half precision that they are in."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:  # tied ones stay tied
                    made[id(parameter)] = nn.Parameter(held(parameter.detach()), requires_grad=False)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.float()


def stored(tensor: Tensor) -> Tensor:
    """The tensor that memory or a file holds: of a parameter that is widened, the one in half precision."""
    return tensor.stored if isinstance(tensor, Widened) else tensor


@contextmanager
def untouched(model: nn.Module) -> Iterator[Callable[[nn.Module], None]]:
    """Puts untouched memory in place of widened parameters, for code that reads shapes and types of them only.

    Yields:
        A function that gives a module which was traced within the block the parameters of ``model`` again.
    """
    places: dict[int, nn.Parameter] = {}
    made: dict[int, nn.Parameter] = {}
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and isinstance(parameter, Widened):
                before.append((module, name, parameter))
    for module, name, parameter in before:
        if id(parameter) not in made:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            made[id(parameter)] = nn.Parameter(empty, requires_grad=False)
            places[empty.data_ptr()] = parameter
        module._parameters[name] = made[id(parameter)]

    def restore(traced: nn.Module) -> None:
        for module in traced.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None and tensor.data_ptr() in places:
                        held[name] = places[tensor.data_ptr()]

    try:
        yield restore
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter
