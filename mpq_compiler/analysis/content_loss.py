"""The metric of content layers: how much a change moves the structure of the clean image that the output predicts.

MixDQ (arXiv 2405.17873, section 4.2) draws 32 images in one step, decodes them, and takes their mean SSIM with a window
of nearly the whole image. Here a window is the whole of the predicted clean latents, so that no decoder is needed, and
inputs are those of all steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpq_compiler.sampling.schedulers import Scheduler

CONSTANTS = (0.01**2, 0.03**2)
"""Those of SSIM (Wang et al., IEEE TIP 2004), of images from 0 to 1."""


@dataclass(frozen=True)
class ContentLoss:
    """1 - SSIM of predicted clean latents, from 0 for equal ones to 2."""

    scheduler: Scheduler
    """The one by which a model's output predicts clean latents."""
    latent: str
    """The name of the input for latents."""

    def __call__(self, output: Tensor, reference: Tensor, inputs: dict[str, Tensor], weights: Tensor) -> float:
        """The mean over inputs.

        Args:
            output: [N, ...], of the changed program.
            reference: [N, ...], of the unchanged one.
            inputs: by name; latents and timesteps are among them.
            weights: [N], how much each input counts.
        """
        clean = (self._clean(reference, inputs), self._clean(output, inputs))
        return float((1 - ssim(*clean)) @ weights.double() / weights.double().sum())

    def _clean(self, output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        rows = zip(*(x.float().numpy() for x in (output, inputs[self.latent], inputs["timestep"])), strict=True)
        return torch.from_numpy(np.stack([self.scheduler.predicted(y[: len(x)], x, float(t)) for y, x, t in rows]))


def ssim(reference: Tensor, value: Tensor) -> Tensor:
    """The structural similarity of each pair of [N, C, ...], f64 [N]: the mean over channels, whole ones as windows.

    Each pair is mapped to what makes its reference span 0 to 1, since latents have no range of their own.
    """
    x, y = (each.double().flatten(2) for each in (reference, value))
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    x, y = ((each - low) / (high - low).clamp_min(1e-12) for each in (x, y))
    mx, my = x.mean(2), y.mean(2)
    vx, vy, vxy = (((a - a.mean(2, True)) * (b - b.mean(2, True))).mean(2) for a, b in ((x, x), (y, y), (x, y)))
    small, large = CONSTANTS
    similar = (2 * mx * my + small) * (2 * vxy + large) / ((mx**2 + my**2 + small) * (vx + vy + large))
    return similar.mean(1)
