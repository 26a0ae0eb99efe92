"""Holds that the parameters which a model reads are finite; what it never reads may be left uninitialised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mpq_compiler.support.errors import UserError


def require_finite(model: torch.nn.Module, call: Callable[[], object], folder: Path) -> None:
    """UserError: a parameter or buffer of a checkpoint's model holds NaN or infinity, and ``call`` reads it."""
    bad = {name: tensor for name, tensor in model.state_dict().items() if not tensor.isfinite().all()}
    if not bad:
        return
    with torch.no_grad(), _Watched() as watched:
        call()
    for name, tensor in bad.items():
        if tensor.data_ptr() in watched.read:
            kind = "NaN" if tensor.isnan().any() else "infinity"
            raise UserError(f"the tensor '{name}' in '{folder}' holds {kind}; the checkpoint is damaged or diverged")


class _Watched(TorchDispatchMode):
    """Keeps where the tensors lie that operators read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: set[int] = set()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        leaves = pytree.tree_leaves((args, kwargs))
        self.read |= {leaf.data_ptr() for leaf in leaves if isinstance(leaf, Tensor)}
        return func(*args, **(kwargs or {}))
