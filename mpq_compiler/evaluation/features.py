"""Feature extractors of small images, for Fréchet distances and class accuracy (benchmarks/train_features.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler.support.errors import UserError

Array = np.ndarray


@dataclass(frozen=True)
class Features:
    """The feature extractor: the 64 penultimate activations of a small image classifier."""

    weights: dict[str, Array]
    scale: float
    """Divides the features, so that their mean square over the real test images is 1."""
    mean: Array
    """The mean of the real test images' features, scaled, [64]."""
    covariance: Array
    """The covariance of the real test images' features, scaled, [64, 64]."""
    shape: tuple[int, int, int]
    """The shape of the images that it was trained on."""

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """Reads the classifier's weights and the real images' statistics from a safetensors file."""
        from mpq_compiler.support import tensorfile

        weights = {name: np.array(value) for name, value in tensorfile.load(path).items()}
        mean = weights.pop("stats.mu").astype(np.float64)
        covariance = weights.pop("stats.cov").astype(np.float64)
        scale = math.sqrt(float((np.diag(covariance) + mean**2).mean()))
        size = 4 * math.isqrt(weights["body.10.weight"].shape[1] // len(weights["body.6.bias"]))
        shape = (weights["body.0.weight"].shape[1], size, size)
        return cls(weights, scale, mean / scale, covariance / scale**2, shape)

    def __call__(self, images: Any) -> tuple[Array, Array]:
        """Computes scaled features [N, 64] and class scores [N, classes] of images of its shape in [-1, 1]."""
        import torch
        from torch.nn import functional as F

        images = np.ascontiguousarray(images, dtype=np.float32)
        if images.shape[1:] != self.shape:
            raise UserError(
                f"the feature extractor takes images {list(self.shape)}, not {list(images.shape[1:])}"
            )
        w = {name: torch.from_numpy(value) for name, value in self.weights.items()}
        features, scores = [], []
        with torch.no_grad():
            for x in torch.from_numpy(images).split(250):
                for conv, norm, stride in ((0, 1, 2), (3, 4, 2), (6, 7, 1)):
                    x = F.conv2d(x, w[f"body.{conv}.weight"], w[f"body.{conv}.bias"], stride, 1)
                    x = F.batch_norm(
                        x,
                        w[f"body.{norm}.running_mean"],
                        w[f"body.{norm}.running_var"],
                        w[f"body.{norm}.weight"],
                        w[f"body.{norm}.bias"],
                    ).relu()
                x = F.linear(x.flatten(1), w["body.10.weight"], w["body.10.bias"]).relu()
                features.append(x.double().numpy() / self.scale)
                scores.append(F.linear(x, w["head.weight"], w["head.bias"]).numpy())
        return np.concatenate(features), np.concatenate(scores)


def features_for(path: Path | None, image_shape: tuple[int, ...]) -> tuple[Features | None, str | None]:
    """The feature extractor for images of a shape, or None and the reason why there is none."""
    if path is None:
        return None, "no feature extractor ships for this model"
    features = Features.load(path)
    if tuple(image_shape) != features.shape:
        return None, f"the feature extractor takes images {list(features.shape)}, not {list(image_shape)}"
    return features, None
