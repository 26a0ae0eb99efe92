"""Distances of two sets of images in a space of features: FID, KID, improved precision and recall.

Row i of both sets is drawn from the same noise and condition. Nothing imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import TypedDict

import numpy as np

from mpq_compiler.evaluation.metrics import share_interval

Array = np.ndarray
NEIGHBOURS = 3
"""The neighbour whose distance is the radius around an image (Kynkäänniemi et al., arXiv 1904.06991)."""
FEWEST = 2 * (NEIGHBOURS + 1)
"""The fewest images with intervals: half of them still have such a neighbour."""
ROUNDS = 50
"""Half-samples of an interval: its width is known to a tenth then."""


def fid(reference: Array, features: Array) -> float:
    """The squared Fréchet distance of the Gaussians of features [N, D] and [N, D] (Heusel et al., arXiv 1706.08500).

    The trace of the root of Ca Cb is the nuclear norm of A B^T, with Ca = A^T A and Cb = B^T B: no root of a matrix is
    taken, and fewer images than features take N x N numbers instead of D x D.
    """
    means, roots = zip(*map(_mean_and_root, (reference, features)), strict=True)
    cross = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    distance = ((means[0] - means[1]) ** 2).sum() + sum((root**2).sum() for root in roots) - 2 * cross
    return max(float(distance), 0.0)


def _mean_and_root(features: Array) -> tuple[Array, Array]:
    """The mean [D], and a root R [min(N, D), D] of the covariance: C = R^T R."""
    mean = features.mean(axis=0)
    centred = (features - mean) / math.sqrt(len(features) - 1)
    return mean, centred if len(centred) <= centred.shape[1] else np.asarray(np.linalg.qr(centred, mode="r"))


def kid(reference: Array, features: Array) -> float:
    """The unbiased squared MMD of features [N, D] by the kernel (x y / D + 1)^3 (Bińkowski et al., arXiv 1801.01401).

    It is the U-statistic over pairs of rows (Gretton et al., JMLR 2012, lemma 6), which leaves out x_i beside y_i:
    both come of the same noise, and are no independent draws.
    """
    both = np.concatenate([reference, features])
    kernel, count = (both @ both.T / both.shape[1] + 1) ** 3, len(features)
    inner, cross = kernel[:count, :count] + kernel[count:, count:], kernel[:count, count:]
    terms = inner - cross - cross.T
    return float((terms.sum() - np.trace(terms)) / (count * (count - 1)))


def precision(reference: Array, features: Array) -> float:
    """The share of images that lie among the reference's: in the ball of one, up to its third neighbour."""
    return float((_distances(features, reference) <= _radii(reference)).any(axis=1).mean())


def recall(reference: Array, features: Array) -> float:
    """The share of the reference's images that lie among the images."""
    return precision(features, reference)


def _distances(one: Array, other: Array) -> Array:
    """Squared distances [N, M] of rows; what is below the rounding of the sums is 0, as equal rows have it."""
    norms = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)
    found = norms - 2 * one @ other.T
    return np.where(found < 1e-12 * norms, 0.0, found)


def _radii(features: Array) -> Array:
    """The squared distance of each row to its third neighbour, [N]."""
    return np.partition(_distances(features, features), NEIGHBOURS, axis=1)[:, NEIGHBOURS]


Figure = dict[str, float]
"""A ``value``, and ``low`` and ``high`` of its interval where there is one."""


class Distances(TypedDict):
    """All distances by some features; None where there are too few images."""

    dimensions: int
    fid: Figure | None
    kid: Figure | None
    precision: Figure | None
    recall: Figure | None


METRICS: dict[str, Callable[[Array, Array], float]] = {"fid": fid, "kid": kid, "precision": precision, "recall": recall}
"""The distances by their names in `Distances`."""
SHARES = ("precision", "recall")
"""Those that lie between 0 and 1."""


def compare(reference: Array, features: Array) -> Distances:
    """Computes all distances of features [N, D] from a reference's, with their 95 % intervals.

    An interval is normal, by the delete-half jackknife (Shao and Wu, Annals of Statistics 1989): the spread of the
    figure over random halves of the images. The bootstrap would draw images twice, which shrinks covariances, adds
    k(x, x) to KID and makes radii 0. Shares that are the same in all halves, such as 1, have the score interval.

    Args:
        reference: the float model's features.
        features: features of images from the same noise.
    """
    both = np.asarray(reference, np.float64), np.asarray(features, np.float64)
    fid, kid, precision, recall = (_figure(name, *both) for name in METRICS)
    return {"dimensions": features.shape[1], "fid": fid, "kid": kid, "precision": precision, "recall": recall}


def _figure(name: str, reference: Array, features: Array) -> Figure | None:
    """A distance and its interval; without the latter, or None, where there are too few images."""
    count, metric = len(features), METRICS[name]
    if count < (NEIGHBOURS + 1 if name in SHARES else 2):
        return None
    value = metric(reference, features)
    if count < FEWEST:
        return {"value": value}
    half = NormalDist().inv_cdf(0.975) * deviation(metric, reference, features)
    low, high = value - half, value + half
    if name in SHARES:
        least, most = share_interval(np.arange(count) < round(value * count))
        low, high = max(min(low, least), 0.0), min(max(high, most), 1.0)
    return {"value": value, "low": max(low, 0.0) if name == "fid" else low, "high": high}


def deviation(metric: Callable[[Array, Array], float], reference: Array, features: Array) -> float:
    """The standard deviation of a figure by the delete-half jackknife: that of the figures of random halves."""
    rng, count = np.random.Generator(np.random.PCG64(0)), len(features)
    halves = (rng.permutation(count)[: count // 2] for _ in range(ROUNDS))
    return float(np.std([metric(reference[rows], features[rows]) for rows in halves]))
