"""Exact definitions of every quality metric that the commands print; docs/metrics.md describes them.

All sums are float64. Images are arrays [N, channels, height, width] in [-1, 1], latents and outputs [N, ...].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mpq_compiler.evaluation.features import Array, Features
from mpq_compiler.support.decibels import sqnr
from mpq_compiler.support.errors import UserError

SQNR_LIMIT_DB = 200.0
"""The SQNR of equal tensors, in place of infinity, which JSON does not have."""
PSNR_LIMIT_DB = 100.0
"""The largest PSNR of an image, so that an equal pair does not make the mean of all infinite."""
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
"""Side and standard deviation of SSIM's Gaussian window, in pixels."""


def _pair(reference: Any, value: Any) -> tuple[Array, Array]:
    a, b = np.asarray(reference, dtype=np.float64), np.asarray(value, dtype=np.float64)
    if a.shape != b.shape:
        raise UserError(f"cannot compare tensors of the shapes {list(a.shape)} and {list(b.shape)}")
    if a.size == 0:
        raise UserError("cannot compare empty tensors")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError("cannot compare tensors that hold NaN or infinity")
    return a, b


def sqnr_db(reference: Any, value: Any) -> float:
    """The SQNR in dB, 10 log10(sum y^2 / sum (y - yq)^2), over all elements together; within +-200 dB."""
    return min(max(sqnr(*_pair(reference, value)), -SQNR_LIMIT_DB), SQNR_LIMIT_DB)


def sqnr_difference_db(reference: Array, value: Array, other: Array) -> tuple[float, float | None]:
    """How many dB the SQNR of ``value`` is above that of ``other``, and the standard error of that.

    The error is the jackknife's (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, eq. 11.5): how far the
    difference moves as one sample after the other is left out. None where it cannot be said: for a single sample, or
    where one sample alone has all the noise.
    """
    difference, count = sqnr_db(reference, value) - sqnr_db(reference, other), len(reference)
    noises = []
    for each in (value, other):
        clean, given = _pair(reference, each)
        noise = ((clean - given) ** 2).reshape(count, -1).sum(axis=1)
        noises.append(noise.sum() - noise)
    if count < 2 or min(map(np.min, noises)) <= 0:
        return difference, None
    left_out = 10 * (np.log10(noises[1]) - np.log10(noises[0]))
    return difference, float(np.sqrt((count - 1) * np.var(left_out)))


def trajectory_sqnr_db(reference: Any, value: Any) -> float:
    """The SQNR in dB of the final latents of two sampling runs from the same noise."""
    return sqnr_db(reference, value)


def image_sqnr_db(reference: Any, value: Any) -> float:
    """The SQNR in dB of decoded images; the signal is the image in [-1, 1]."""
    return sqnr_db(reference, value)


def psnr_per_image(reference: Any, value: Any) -> Array:
    """The PSNR of every image in dB, [N]: 10 log10(4 / mean squared error), since the range is 2; at most 100."""
    x, y = _pair(reference, value)
    error = ((x - y) ** 2).reshape(len(x), -1).mean(axis=1)
    decibels: Array = np.minimum(10 * np.log10(4 / np.maximum(error, 1e-300)), PSNR_LIMIT_DB)
    return decibels


def psnr_db(reference: Any, value: Any) -> float:
    """The mean PSNR of the images, in dB."""
    return float(psnr_per_image(reference, value).mean())


def ssim_per_image(reference: Any, value: Any) -> Array:
    """The structural similarity of every image, [N]: the mean over channels and over all whole windows.

    Wang, Bovik, Sheikh and Simoncelli (IEEE TIP 2004): a Gaussian window of 11x11 with sigma 1.5, K = (0.01, 0.03), on
    images mapped to [0, 1] (SSIM is not invariant to a shift). scikit-image agrees with gaussian_weights=True,
    use_sample_covariance=False and data_range=1.
    """
    x, y = _pair(reference, value)
    if x.ndim != 4 or min(x.shape[2:]) < SSIM_WINDOW:
        raise UserError(
            f"SSIM needs images [N, C, H, W] of at least {SSIM_WINDOW} pixels, not {list(x.shape)}"
        )
    x, y = (x + 1) / 2, (y + 1) / 2
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    window /= window.sum()

    def blur(image: Array) -> Array:
        for axis in (2, 3):
            image = np.lib.stride_tricks.sliding_window_view(image, SSIM_WINDOW, axis=axis) @ window
        return image

    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    values = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    means: Array = values.reshape(len(x), -1).mean(axis=1)
    return means


def ssim(reference: Any, value: Any) -> float:
    """The mean structural similarity of the images."""
    return float(ssim_per_image(reference, value).mean())


def frechet(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """The squared Fréchet distance of two Gaussians: |ma - mb|^2 + tr(Ca + Cb - 2 (Ca^1/2 Cb Ca^1/2)^1/2)."""
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    distance = float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
    return max(distance, 0.0)


def gaussian(features: Array) -> tuple[Array, Array]:
    """The mean [D] and covariance [D, D] of features [N, D]. UserError: N is less than 2."""
    if len(features) < 2:
        raise UserError("the Fréchet distance needs 2 images or more")
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_to_float(reference: Any, images: Any, features: Features) -> float:
    """The Fréchet distance of `images` from those of the float model, drawn from the same noise."""
    return frechet(*gaussian(features(reference)[0]), *gaussian(features(images)[0]))


def frechet_to_data(images: Any, features: Features) -> float:
    """The Fréchet distance of `images` from the real test images."""
    return frechet(*gaussian(features(images)[0]), features.mean, features.covariance)


def class_accuracy(images: Any, labels: Any, features: Features) -> float:
    """The share of images that the extractor's classifier assigns to the class that was asked for."""
    return float((features(images)[1].argmax(axis=1) == np.asarray(labels)).mean())


def interval(values: Any, level: float = 0.95) -> tuple[float, float]:
    """The normal confidence interval of the mean of independent `values` [N]; (mean, mean) for one value."""
    from statistics import NormalDist

    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, mean
    half = NormalDist().inv_cdf(0.5 + level / 2) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


def share_interval(hits: Any, level: float = 0.95) -> tuple[float, float]:
    """The score interval (Wilson 1927) of a share, given `hits` [N] of 0 and 1.

    It lies within 0 and 1, and has some width even where all hits are alike.
    """
    from statistics import NormalDist

    values = np.asarray(hits, dtype=np.float64)
    z2, count, share = NormalDist().inv_cdf(0.5 + level / 2) ** 2, len(values), float(values.mean())
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(
    statistic: Callable[..., float], *arrays: Array, rounds: int = 200, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of `statistic(*arrays)`.

    Args:
        statistic: computes a figure from the arrays.
        arrays: rows of them are drawn together.
        rounds: the number of resamples.
        level: of confidence.
        seed: of the resamples.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    count = len(arrays[0])
    values = [
        statistic(*(array[rows] for array in arrays))
        for rows in (rng.integers(0, count, count) for _ in range(rounds))
    ]
    low, high = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def compare_images(
    reference: Any,
    images: Any,
    features: Features | None = None,
    reason: str | None = None,
    labels: Any = None,
) -> dict[str, Any]:
    """Computes every image metric with its 95 % interval, as JSON: {metric: {"value", "low", "high"} or null, ...}.

    A metric that does not apply is null, and "reasons" says why. What the reference images have by themselves is
    "float". Fréchet distances come without an interval, because
    resampling would be biased (repeated images shrink the covariance).

    Args:
        reference: images to compare with.
        images: images from the same noise.
        features: the feature extractor, or None.
        reason: why there is no extractor.
        labels: the classes that were asked for [N], or None.
    """
    reference, images = np.asarray(reference), np.asarray(images)
    result: dict[str, Any] = {"images": len(images)}
    reasons: dict[str, str] = {}
    low, high = bootstrap(image_sqnr_db, reference, images)
    result["image_sqnr_db"] = {"value": image_sqnr_db(reference, images), "low": low, "high": high}
    per_image = {"psnr_db": psnr_per_image, "ssim": ssim_per_image}
    for name, measure in per_image.items():
        try:
            values = measure(reference, images)
        except UserError as error:
            result[name], reasons[name] = None, str(error)
            continue
        low, high = interval(values)
        result[name] = {"value": float(values.mean()), "low": low, "high": high}
    for name in ("frechet_to_float", "frechet_to_data", "class_accuracy"):
        result[name] = None
    if features is None:
        reasons.update(
            dict.fromkeys(("frechet_to_float", "frechet_to_data"), reason or "no feature extractor")
        )
    else:
        (theirs, expected), (own, scores) = features(reference), features(images)
        if len(images) > 1:
            result["frechet_to_float"] = {"value": frechet(*gaussian(theirs), *gaussian(own))}
            to_data = [frechet(*gaussian(found), features.mean, features.covariance) for found in (own, theirs)]
            result["frechet_to_data"] = dict(zip(("value", "float"), to_data, strict=True))
        else:
            reasons.update(
                dict.fromkeys(("frechet_to_float", "frechet_to_data"), "it needs 2 images or more")
            )
        if labels is not None:
            hits, of_float = ((s.argmax(axis=1) == np.asarray(labels)).astype(np.float64) for s in (scores, expected))
            low, high = share_interval(hits)
            result["class_accuracy"] = {
                "value": float(hits.mean()),
                "low": max(low, 0.0),
                "high": min(high, 1.0),
                "float": float(of_float.mean()),
            }
    if reasons:
        result["reasons"] = reasons
    return result
