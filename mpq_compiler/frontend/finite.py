"""Holds that the parameters which a model reads are finite; what it never reads may be left uninitialised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch._ops import OpOverload

from mpq_compiler.frontend.watching import Watching
from mpq_compiler.frontend.widened import stored
from mpq_compiler.support.errors import UserError


def require_finite(model: torch.nn.Module, calls: Iterable[Callable[[], object]], folder: Path) -> None:
    """UserError: a parameter or buffer of a checkpoint's model holds NaN or infinity, and one of ``calls`` reads it."""
    bad = {name: tensor for name, tensor in _tensors(model) if not tensor.isfinite().all()}
    if not bad:
        return
    with torch.no_grad(), _Watched() as watched:
        for call in calls:
            call()
    for name, tensor in bad.items():
        if tensor.data_ptr() in watched.read:
            kind = "NaN" if tensor.isnan().any() else "infinity"
            raise UserError(f"the tensor '{name}' in '{folder}' holds {kind}; the checkpoint is damaged or diverged")


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, stored(tensor)) for name, tensor in model.state_dict(keep_vars=True).items())


class _Watched(Watching):
    """Keeps where the tensors lie that operators read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()

    def saw(self, func: OpOverload, args: tuple[object, ...], given: list[Tensor], output: object) -> None:
        self.read |= {stored(tensor).data_ptr() for tensor in given}
