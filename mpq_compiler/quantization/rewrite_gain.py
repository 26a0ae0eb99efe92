"""What exact rewrites of layers would gain: the error of their outputs with both sides quantized, before and after.

A rewrite changes the tensor that some layers read, and undoes that in their weights. It is tried on rows of what the
layers read, one quantizer for each interval of time, as time groups will have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler.formats import activation

INTERVALS = 4
"""Of time, each with a quantizer of its own."""
FITTED = 4096
"""Values on which a quantizer is fitted."""
HELD_BYTES = 1 << 30
"""Memory for the sampled rows."""

Rows = dict[tuple[Any, ...], Tensor]
"""By window (`row_geometry`): [R, K], in the order of time."""
Change = Callable[[Tensor], Tensor]
"""Of the channels of a tensor [..., C]."""


@dataclass
class Layers:
    """The layers that read one tensor edge, and rows of what they read."""

    edge: fx.Node
    readers: list[fx.Node]
    largest: Tensor
    """Of each channel's magnitudes, f32 [C]."""
    parts: dict[tuple[Any, ...], list[Tensor]] = field(default_factory=dict)
    """The rows as they were found, by window."""

    @property
    def channels(self) -> int:
        return len(self.largest)

    def rows(self) -> Rows:
        return {geometry: torch.cat(parts) for geometry, parts in self.parts.items()}


def gain_db(before: float, after: float) -> float:
    """Of errors."""
    return 10 * math.log10(max(before, 1e-30) / max(after, 1e-30))


def quantized(x: Tensor, bits: int) -> Tensor:
    """Rows in the order of time, by one quantizer an interval."""
    found = []
    for interval in x.chunk(INTERVALS):
        values = interval.flatten()
        low, high = values.aminmax()
        stride = max(1, len(values) // FITTED) | 1  # odd, so that all channels have their turn
        scale, zero, _ = activation.fit(values[::stride], low, high, bits)
        s, z = scale.float(), zero.float()
        codes = torch.maximum(torch.minimum(torch.round(interval / s), (2**bits - 1) - z), -z)
        found.append(codes * s)
    return torch.cat(found)
