"""The type of a model's time: schedulers give fractions of it, and only some models take them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._ops import OpOverload

from mpq_compiler.frontend.watching import Watching
from mpq_compiler.sampling.call_tree import TIME

aten = torch.ops.aten


@torch.no_grad()
def takes_fractions(module: torch.nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Whether a model computes with its time in floats.

    Such a model returns the same bits for whole times and for the same numbers in float32, and makes no integers of
    them. One that reads its time from a table is none: it refuses floats, or rounds them.

    Args:
        module: the model as a function of named tensors.
        inputs: of a call, with whole times.
    """
    whole = {name: value.clone() for name, value in inputs.items()}
    fractions = {name: value.clone() for name, value in inputs.items()}
    fractions[TIME] = fractions[TIME].float()
    rounding = _Rounding()
    try:
        with rounding:
            found = module(**fractions)
        return not rounding.found and torch.equal(found, module(**whole))
    except Exception:  # a model may raise anything
        return False


class _Rounding(Watching):
    """Notices whether a model casts floats to integers."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def saw(self, func: OpOverload, args: tuple[object, ...], given: list[Tensor], output: object) -> None:
        if func is aten._to_copy.default and isinstance(output, Tensor):
            self.found |= given[0].is_floating_point() and not (output.is_floating_point() or output.is_complex())
