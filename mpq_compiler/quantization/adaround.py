"""Learned rounding: each code is the level below or above its weight, whichever serves the layer's output.

AdaRound (Nagel 2020, arXiv 2004.10568, section 3) on any table of the weight contract, as low-bit floating point needs
it (arXiv 2408.06995): levels need not be evenly spaced, the two neighbours of a weight are those of its own binade. The
loss is that of the layer's output in closed form, from the second moments of its input, so that no data is replayed.
What gradients decide ends in a descent by single weights: inputs are so much alike that Adam alone stays far from any
optimum.
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
"""Of Adam, which has settled by then."""
RATE = 1e-2
BETAS = (0.9, 0.999)
STRENGTH = 0.01
"""Of the regularizer, for each weight."""
UNIT = 1e-3
"""What the output error of the nearest codes counts in the loss, for each weight: rows differ by magnitudes."""
SHARPNESS = 20.0, 2.0
"""Exponents of the regularizer at first and in the end: first it pulls those that are nearly decided."""
WARM = 0.2
"""Share of the steps without it."""
STRETCH = 0.1
"""How far the sigmoid reaches beyond 0 and 1, where it is cut (Louizos 2018, arXiv 1712.01312)."""
SWEEPS = 6
"""Turns of the descent at most, each over all weights of a row."""


def adaround(rows: Tensor, nearest: QuantizedWeight, gram: Tensor, steps: int = STEPS) -> QuantizedWeight:
    """``nearest`` with the codes that are learned, in the rows where their output error is the lesser.

    With ``h = clip(1.2 sigmoid(V) - 0.1, 0, 1)`` weights are ``low + h (high - low)``, for each row minimizing
    ``0.001 K e G e^T / E + 0.01 sum_k (1 - |2 h_k - 1|^beta)``, E the error of the nearest codes; V by Adam, from the
    weights themselves. Then h is 0 or 1, and changes for single weights as long as that is better (`_descended`). There
    is no randomness.

    rows: f32 [O, K]
    gram: the second moments [K, K] of the layer's input, whole
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
    """The slope of ``1 - |2h - 1|^beta``."""
    beta = SHARPNESS[1] + (SHARPNESS[0] - SHARPNESS[1]) * (1 + math.cos(math.pi * progress)) / 2
    centred = 2 * h - 1
    return centred.abs().pow_(beta - 1).mul_(centred.sign()).mul_(-2 * beta)


def _descended(pairs: _Neighbours, up: Tensor, gram: Tensor) -> Tensor:
    """``up`` [O, K] after each weight in turn has gone to its other level where its row errs less by that.

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
    """The levels around each weight [O, K]: the lower less the weight, their distance, where the weight lies between.

    Beyond the ends of the table both are the last level: there is nothing to learn.
    """

    error: Tensor
    gap: Tensor
    fraction: Tensor
    index: Tensor
    order: Tensor | None
    """Codes by rising level [O, levels]; None where codes are the levels."""

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
        """The codes of the lower levels, and of the upper where ``up``."""
        chosen = self.index + up.long()
        return chosen.to(torch.int8) if self.order is None else self.order.gather(1, chosen).to(torch.uint8)
