"""The gain of exact rewrites: the output error of layers with weights and inputs quantized, before and after.

A rewrite changes the tensor that some layers read, and undoes that in their weights. It is tried on sampled rows of the
layers' input, with one quantizer for each interval of time, as time groups will have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler.formats import activation
from mpq_compiler.ir import scratch

INTERVALS = 4
"""The number of intervals of time, each of which has a quantizer of its own."""
FITTED = 4096
"""The number of values on which a quantizer is fitted, at most."""
HELD_BYTES = 1 << 29
"""Bytes of memory for sampled rows."""

Rows = dict[tuple[Any, ...], Tensor]
"""Sampled rows [R, K] in the order of time, by the layers' window (`ir.edges.row_geometry`)."""
Change = Callable[[Tensor], Tensor]
"""A rewrite of the channels of a tensor [..., C]."""


@dataclass
class Samples:
    """Sampled rows of a tensor edge."""

    largest: Tensor = field(default_factory=lambda: torch.zeros(()))
    """The largest magnitude of each channel, f32 [C]."""
    parts: dict[tuple[Any, ...], list[Tensor]] = field(default_factory=dict)
    """The sampled rows of each batch in order, by window."""

    def add(self, other: Samples) -> None:
        """Adds rows of later inputs."""
        self.largest = torch.maximum(self.largest, other.largest)
        for geometry, rows in other.parts.items():
            self.parts.setdefault(geometry, []).extend(rows)

    def joined(self) -> Rows:
        """The sampled rows of all batches."""
        return {geometry: torch.cat(parts) for geometry, parts in self.parts.items()}

    def scaled(self, factor: Tensor) -> Samples:
        """Those of the edge whose channels are multiplied by positive factors [C]."""

        def scale(rows: Tensor) -> Tensor:
            return scratch.kept((rows.unflatten(1, (-1, len(factor))) * factor).flatten(1))

        parts = {geometry: [scale(rows) for rows in parts] for geometry, parts in self.parts.items()}
        return Samples(self.largest * factor, parts)


@dataclass
class Layers:
    """The layers that read one tensor edge, and sampled rows of their input."""

    edge: fx.Node
    readers: list[fx.Node]
    samples: Samples

    @property
    def largest(self) -> Tensor:
        """The largest magnitude of each channel, f32 [C]."""
        return self.samples.largest

    @property
    def channels(self) -> int:
        """The number of channels of the edge."""
        return len(self.largest)

    def rows(self) -> Rows:
        """The sampled rows of all batches."""
        return self.samples.joined()


def gain_db(before: float, after: float) -> float:
    """The ratio of two squared errors, before to after, in dB; positive where the error falls."""
    return 10 * math.log10(max(before, 1e-30) / max(after, 1e-30))


def quantized(x: Tensor, bits: int) -> Tensor:
    """Quantizes and dequantizes rows [R, K], given in the order of time, with one quantizer for each interval."""
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
