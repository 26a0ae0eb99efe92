"""A device that is none: its tensors lie in memory here, and what mixes them with others fails as on a GPU.

>>> with pretend_device.there() as device:
...     torch.ones(3).to(device) + torch.ones(3)
RuntimeError: aten::add: tensors on two devices, meta:1 and cpu

Its name is one that torch knows and nobody uses. A tensor of it wraps one on the CPU, whose kernels compute it, if not
those that torch fuses there. As on CUDA, numbers [] mix with all, indices may lie on the CPU, and copies go both
ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "meta:1"
DEVICE = torch.device(NAME)
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}


class There(torch.Tensor):
    """A tensor on the device."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        """The tensor there of one here."""
        made = torch.Tensor._make_wrapper_subclass(
            cls, here.size(), here.stride(), here.storage_offset(), dtype=here.dtype, device=DEVICE
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: OpOverload, types: object, args: Any = (), kwargs: Any = None) -> Any:
        return _called(func, args, kwargs or {})

    def __repr__(self, **_: object) -> str:
        return f"There({self.here})"


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: OpOverload, types: object, args: Any = (), kwargs: Any = None) -> Any:
        return _called(func, args, kwargs or {})


@contextmanager
def there() -> Iterator[str]:
    """The device exists within the block, on this thread; yields its name."""
    with _Mode():
        yield NAME


def _here(value: object) -> object:
    return value.here if isinstance(value, There) else value


def _called(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Calls an operator on the tensors here, and returns its results where they would lie."""
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    inside = any(isinstance(t, There) for t in given)
    asked = kwargs.get("device")
    if asked is not None:
        inside = torch.device(asked) == DEVICE
        kwargs = {**kwargs, "device": "cpu" if inside else asked}
    indexed = func.namespace == "aten" and func._schema.name.startswith(("aten::index", "aten::_index"))
    strange = [t for t in given if not isinstance(t, There) and t.dim() and not (indexed and not t.is_floating_point())]
    if inside and strange and func not in MOVES:
        raise RuntimeError(f"{func._schema.name}: tensors on two devices, {NAME} and {strange[0].device}")
    result = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    if func._schema.is_mutable:  # the tensors that were written to, as they were given
        written = {id(_here(t)): t for t in given}
        return tree_map(lambda t: written.get(id(t), t) if isinstance(t, Tensor) else t, result)
    return tree_map(lambda t: There(t) if isinstance(t, Tensor) else t, result) if inside else result
