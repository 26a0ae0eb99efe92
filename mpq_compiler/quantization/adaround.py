"""AdaRound, learned rounding: each code is the level below or above its weight, whichever serves the layer's output.

AdaRound (Nagel 2020, arXiv 2004.10568, section 3) runs here on any table of the weight contract, as low-bit floating
point needs it (arXiv 2408.06995): levels need not be evenly spaced, since a weight's two neighbours are those of its
own binade. The loss is the error of the layer's output in closed form, from the second moments of its input, so no data
is replayed. A coordinate descent follows Adam, because correlated inputs leave Adam alone far from any optimum.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mpq_compiler.formats import contract
from mpq_compiler.formats.base import QuantizedWeight, output_error
from mpq_compiler.formats.contract import rising

STEPS = 600
"""The number of Adam's steps, by which it has converged."""
RATE = 1e-2
"""Adam's learning rate."""
BETAS = (0.9, 0.999)
"""Adam's decay rates of the first and second moments."""
STRENGTH = 0.01
"""The regularizer's factor in the loss, for each weight."""
UNIT = 1e-3
"""The loss of the nearest codes, for each weight: it puts rows, whose errors differ by magnitudes, on one scale."""
SHARPNESS = 20.0, 2.0
"""The regularizer's exponent at first and in the end; a large one pulls only weights that are nearly decided."""
WARM = 0.2
"""The share of the steps, in the beginning, without the regularizer."""
STRETCH = 0.1
"""How far the stretched sigmoid exceeds 0 and 1, where it is clipped (Louizos 2018, arXiv 1712.01312)."""
SWEEPS = 6
"""The most sweeps of the coordinate descent over all weights of a row."""


def adaround(rows: Tensor, nearest: QuantizedWeight, gram: Tensor, steps: int = STEPS) -> QuantizedWeight:
    """Learns the codes of a weight; rows keep the nearest codes where learned ones have no smaller output error.

    Weights are ``low + h (high - low)`` with ``h = clip(1.2 sigmoid(V) - 0.1, 0, 1)``. Adam starts from the weights
    themselves and minimizes ``0.001 K e G e^T / E + 0.01 sum_k (1 - |2 h_k - 1|^beta)`` over V for each row, where E is
    the error of the nearest codes. Then h is rounded to 0 or 1, and a coordinate descent follows (`_descended`).
    Nothing is random.

    Args:
        rows: the weight, f32 [O, K].
        nearest: its fit with the nearest codes.
        gram: the whole second moments [K, K] of the layer's input.
        steps: steps of Adam.

    Returns:
        The fit with other codes; scales, offsets and tables stay.
    """
    pairs = _Neighbours.of(rows, nearest)
    before = output_error(nearest.dequantize() - rows, gram)
    weight = (2 * UNIT * rows.shape[1] / before.clamp_min(1e-30))[:, None] * pairs.gap
    value = torch.logit((pairs.fraction + STRETCH) / (1 + 2 * STRETCH))
    first, second = torch.zeros_like(value), torch.zeros_like(value)
    warm = int(WARM * steps)
    for step in range(steps):
        sigmoid = torch.sigmoid(value)
        h = (sigmoid * (1 + 2 * STRETCH) - STRETCH).clamp_(0, 1)
        slope = torch.addcmul(pairs.error, h, pairs.gap).matmul(gram).mul_(weight)
        if step >= warm:
            slope.add_(_pull(h, (step - warm) / max(1, steps - 1 - warm)), alpha=STRENGTH)
        inside = ((h > 0) & (h < 1)).to(torch.float32)
        slope.mul_(sigmoid).mul_(1 - sigmoid).mul_(inside)
        first.lerp_(slope, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(slope, slope, value=1 - BETAS[1])
        scale = math.sqrt(1 - BETAS[1] ** (step + 1))
        value.addcdiv_(first, second.sqrt().add_(1e-12), value=-RATE * scale / (1 - BETAS[0] ** (step + 1)))
    found = dataclasses.replace(nearest, codes=pairs.codes(_descended(pairs, value > 0, gram)))
    better = output_error(found.dequantize() - rows, gram) < before
    return dataclasses.replace(nearest, codes=torch.where(better[:, None], found.codes, nearest.codes))


def _pull(h: Tensor, progress: float) -> Tensor:
    """The slope of the regularizer ``1 - |2h - 1|^beta`` at a progress from 0 to 1, which decides beta."""
    beta = SHARPNESS[1] + (SHARPNESS[0] - SHARPNESS[1]) * (1 + math.cos(math.pi * progress)) / 2
    centred = 2 * h - 1
    return centred.abs().pow_(beta - 1).mul_(centred.sign()).mul_(-2 * beta)


def _descended(pairs: _Neighbours, up: Tensor, gram: Tensor) -> Tensor:
    """Coordinate descent: flips ``up`` [O, K] of each weight in turn where that lowers its row's output error.

    Moving weight k by d changes the error ``e G e^T`` by ``d (2 (e G)_k + d G_kk)``.
    """
    order = torch.argsort(gram.diagonal(), descending=True, stable=True).tolist()
    step = torch.where(up, -pairs.gap, pairs.gap).T.contiguous()  # of each weight, to its other level
    served = (gram @ (pairs.error + up * pairs.gap).T).contiguous()
    for _ in range(SWEEPS):
        moved = False
        for k in order:
            better = step[k] * (2 * served[k] + step[k] * gram[k, k]) < 0
            if better.any():
                moved = True
                served.addr_(gram[k], torch.where(better, step[k], 0.0))
                step[k] = torch.where(better, -step[k], step[k])
        if not moved:
            break
    return torch.where(pairs.gap > 0, step.T < 0, up)


@dataclass(frozen=True)
class _Neighbours:
    """The two levels around each weight [O, K].

    Beyond the ends of the table both are its last level, so there is nothing to learn.
    """

    error: Tensor
    """The lower level minus the weight."""
    gap: Tensor
    """The distance between the two levels."""
    fraction: Tensor
    """Where the weight lies between the levels, 0 to 1."""
    index: Tensor
    """The rank of the lower level among the levels."""
    order: Tensor | None
    """The codes in the order of rising levels [O, levels]; None where codes are the levels."""

    @classmethod
    def of(cls, rows: Tensor, weight: QuantizedWeight) -> _Neighbours:
        scale = contract.column_scale(weight.scale, weight.segments, rows.shape[1])
        offset = torch.zeros(len(rows), 1) if weight.offset is None else weight.offset.float()[:, None]
        t = (rows - offset) / scale
        order = None
        if weight.lut is None:
            index = t.floor().clamp(-contract.LUT_MAX, contract.LUT_MAX - 1)
            low, high = index, index + 1
        else:
            classes = contract.row_classes(weight.row_class, len(rows))
            levels, order = (part[classes] for part in rising(weight.lut))
            last = levels.isfinite().sum(1, keepdim=True) - 2
            index = (torch.searchsorted(levels, t.contiguous(), right=True) - 1).clamp_min(0).minimum(last)
            low, high = levels.gather(1, index), levels.gather(1, index + 1)
        fraction = torch.where(high > low, (t - low) / (high - low).clamp_min(1e-30), 0.0).clamp(0, 1)
        low = torch.where(t > high, high, low)
        gap = torch.where(t < low, 0.0, high - low)
        return cls(low * scale + offset - rows, gap * scale, fraction, index.long(), order)

    def codes(self, up: Tensor) -> Tensor:
        """The codes of the upper levels where ``up`` [O, K] is true, else of the lower ones."""
        chosen = self.index + up.long()
        return chosen.to(torch.int8) if self.order is None else self.order.gather(1, chosen).to(torch.uint8)
