"""Metrics against values computed by hand, against scipy, and their invariants."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage

from mpq_compiler.evaluation import metrics
from mpq_compiler.evaluation.features import Features, features_for
from mpq_compiler.frontend.denoiser import load
from mpq_compiler.sampling.loop import gaussian, sample
from mpq_compiler.support.errors import UserError


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """40 images of the bundled model, 4 of every class."""
    model = load("fashion-unet")
    noise = gaussian(40, model.latent_shape, 3)
    return model.decode(sample(model, model.scheduler, noise, model.default_conditions(40), 10))


@pytest.fixture(scope="module")
def features() -> Features:
    return Features.load(load("fashion-unet").features)


def random_images(count: int = 3, shape: tuple[int, ...] = (2, 16, 20), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, *shape)).astype(np.float32)


def noisy(images: np.ndarray, sigma: float, seed: int = 1) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(images.shape).astype(np.float32)
    return np.clip(images + np.float32(sigma) * noise, -1, 1)


def test_sqnr_by_hand():
    assert metrics.sqnr_db([3.0, 4.0], [3.0, 3.5]) == pytest.approx(20.0)  # 25 / 0.25
    assert metrics.sqnr_db([1.0, 1.0], [0.0, 0.0]) == 0.0
    assert metrics.sqnr_db([1.0], [1.0]) == metrics.SQNR_LIMIT_DB
    assert metrics.sqnr_db([0.0], [1.0]) == -metrics.SQNR_LIMIT_DB
    assert metrics.sqnr_db([0.0], [0.0]) == metrics.SQNR_LIMIT_DB


def test_sqnr_pools_signal_and_noise_over_all_elements():
    """Not the mean of decibels: a sample with little signal has little weight."""
    reference, value = np.array([[10.0], [0.1]]), np.array([[9.0], [0.0]])
    assert metrics.sqnr_db(reference, value) == pytest.approx(10 * math.log10(100.01 / 1.01))


def test_sqnr_invariants():
    x = random_images()
    y = noisy(x, 0.1)
    base = metrics.sqnr_db(x, y)
    order = np.random.default_rng(0).permutation(x.size)
    assert metrics.sqnr_db(-7 * x, -7 * y) == pytest.approx(base)
    assert metrics.sqnr_db(x.ravel()[order], y.ravel()[order]) == pytest.approx(base)
    assert metrics.sqnr_db(x, x + 10 * (y - x)) == pytest.approx(base - 20, abs=1e-3)
    assert metrics.image_sqnr_db(x, y) == metrics.trajectory_sqnr_db(x, y) == base


def test_psnr_by_hand():
    x = np.zeros((2, 1, 2, 2))
    y = x.copy()
    y[0] += 0.2  # 4 / 0.04 = 20 dB
    y[1, 0, 0, 0] = 2.0  # a mean square of 1: 4 / 1
    assert metrics.psnr_per_image(x, y) == pytest.approx([20.0, 10 * math.log10(4)])
    assert metrics.psnr_db(x, y) == pytest.approx((20 + 10 * math.log10(4)) / 2)
    assert metrics.psnr_db(x, x) == metrics.PSNR_LIMIT_DB


def test_ssim_by_hand():
    """Of constant images only the luminance term is left."""
    x, y = np.full((1, 1, 11, 11), -0.2), np.full((1, 1, 11, 11), 0.6)  # 0.4 and 0.8 in [0, 1]
    assert metrics.ssim(x, y) == pytest.approx((2 * 0.32 + 1e-4) / (0.16 + 0.64 + 1e-4))


def test_ssim_is_the_published_formula():
    x = random_images()
    y = noisy(x, 0.2)
    a, b = (x.astype(np.float64) + 1) / 2, (y.astype(np.float64) + 1) / 2

    def blur(image: np.ndarray) -> np.ndarray:
        full = scipy.ndimage.gaussian_filter(image, 1.5, radius=5, axes=(2, 3))
        return full[:, :, 5:-5, 5:-5]

    ma, mb = blur(a), blur(b)
    va, vb, vab = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    expected = (2 * ma * mb + 1e-4) * (2 * vab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    assert metrics.ssim_per_image(x, y) == pytest.approx(expected.mean(axis=(1, 2, 3)), rel=1e-9)


def test_ssim_invariants():
    x = random_images()
    y = noisy(x, 0.1)
    assert metrics.ssim(x, x) == pytest.approx(1)
    assert metrics.ssim(x, y) == pytest.approx(metrics.ssim(y, x))
    assert 1 > metrics.ssim(x, y) > metrics.ssim(x, noisy(x, 0.3)) > metrics.ssim(x, -x)
    assert metrics.ssim(x[..., ::-1], y[..., ::-1]) == pytest.approx(metrics.ssim(x, y))
    with pytest.raises(UserError, match="at least 11 pixels"):
        metrics.ssim(x[..., :10], y[..., :10])


def test_frechet_by_hand():
    mean, cov = np.zeros(2), np.diag([1.0, 4.0])
    other = np.array([3.0, 4.0]), np.diag([9.0, 4.0])
    assert metrics.frechet(mean, cov, *other) == pytest.approx(25 + (1 - 3) ** 2)
    assert metrics.frechet(mean, cov, mean, cov) == pytest.approx(0, abs=1e-12)


def test_frechet_is_the_general_formula():
    rng = np.random.default_rng(0)
    (ma, a), (mb, b) = ((rng.standard_normal(5), np.cov(rng.standard_normal((5, 30)))) for _ in range(2))
    expected = ((ma - mb) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert metrics.frechet(ma, a, mb, b) == pytest.approx(expected)
    assert metrics.frechet(mb, b, ma, a) == pytest.approx(expected)
    q = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    assert metrics.frechet(q @ ma, q @ a @ q.T, q @ mb, q @ b @ q.T) == pytest.approx(expected)
    singular = np.zeros((5, 5))
    assert metrics.frechet(ma, a, ma, singular) == pytest.approx(np.trace(a))


def test_features_of_real_statistics_have_unit_mean_square(features):
    assert (np.diag(features.covariance) + features.mean**2).mean() == pytest.approx(1)
    assert features.mean.shape == (64,) and features.covariance.shape == (64, 64)


def test_the_bundled_model_draws_what_it_is_asked_for(images, features):
    labels = np.arange(40) % 10
    assert metrics.class_accuracy(images, labels, features) > 0.75
    assert metrics.class_accuracy(images, (labels + 1) % 10, features) < 0.2


def test_frechet_orders_damage(images, features):
    distances = [
        metrics.frechet_to_float(images, noisy(images, sigma), features) for sigma in (0.02, 0.1, 0.4)
    ]
    assert 0 <= distances[0] < distances[1] < distances[2]
    assert metrics.frechet_to_float(images, images, features) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_to_float(images, images[::-1], features) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_to_data(images, features) < metrics.frechet_to_data(noisy(images, 0.4), features)


def test_features_do_not_depend_on_the_batch(images, features):
    whole = features(np.concatenate([images] * 7))[0]
    np.testing.assert_allclose(whole[:40], features(images[:40])[0], rtol=1e-4, atol=1e-5)


def test_images_of_another_kind_have_no_frechet_distance(features):
    with pytest.raises(UserError, match=r"takes images \[1, 28, 28\], not \[3, 32, 32\]"):
        features(np.zeros((2, 3, 32, 32)))
    path = load("fashion-unet").features
    assert features_for(path, (1, 28, 28))[1] is None
    assert "not [3, 32, 32]" in features_for(path, (3, 32, 32))[1]
    assert "no feature extractor" in features_for(None, (1, 28, 28))[1]


@pytest.mark.parametrize("bad", [np.zeros((2, 3)), np.full((2, 2), np.nan), np.zeros((0, 2))])
def test_tensors_that_cannot_be_compared(bad):
    with pytest.raises(UserError, match="cannot compare"):
        metrics.sqnr_db(np.zeros((2, 2)) if bad.size else bad, bad)


def test_intervals_hold_what_they_promise():
    rng = np.random.default_rng(0)
    inside = [low <= 1 <= high for low, high in (metrics.interval(rng.normal(1, 2, 50)) for _ in range(400))]
    assert 0.90 < np.mean(inside) < 0.98
    assert metrics.interval([3.0]) == (3.0, 3.0)
    for share in (0.5, 0.99):
        hits = rng.random((400, 200)) < share
        inside = [low <= share <= high for low, high in map(metrics.share_interval, hits)]
        assert 0.92 < np.mean(inside) < 0.985
    low, high = metrics.share_interval(np.ones(200))
    assert 0.97 < low < 0.99 and high == 1
    x = rng.normal(0, 1, (300, 8))
    y = x + rng.normal(0, 0.1, (300, 8))
    low, high = metrics.bootstrap(metrics.sqnr_db, x, y)
    assert low < metrics.sqnr_db(x, y) < high and high - low < 1
    assert metrics.bootstrap(metrics.sqnr_db, x, y) == (low, high)


def test_all_image_metrics_together(images, features):
    result = metrics.compare_images(images, noisy(images, 0.05), features, labels=np.arange(40) % 10)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert "reasons" not in result
    assert result["images"] == 40
    for name in ("image_sqnr_db", "psnr_db", "ssim", "class_accuracy"):
        assert result[name]["low"] <= result[name]["value"] <= result[name]["high"]
    assert result["psnr_db"]["value"] == pytest.approx(metrics.psnr_db(images, noisy(images, 0.05)))
    assert result["class_accuracy"]["float"] == metrics.class_accuracy(images, np.arange(40) % 10, features)
    assert result["frechet_to_data"]["float"] == pytest.approx(metrics.frechet_to_data(images, features))
    same = metrics.compare_images(images[:1], images[:1], None, "no extractor ships for this model")
    assert same["frechet_to_float"] is None and same["reasons"]["frechet_to_data"].startswith("no extractor")
    assert same["psnr_db"]["value"] == metrics.PSNR_LIMIT_DB
    small = metrics.compare_images(images[..., :8, :8], images[..., :8, :8])
    assert small["ssim"] is None and "11 pixels" in small["reasons"]["ssim"]


def test_the_error_of_a_difference_is_what_other_samples_would_make_of_it():
    """Against the spread of the difference over many draws of as many samples."""
    rng = np.random.default_rng(0)

    def drawn(count: int) -> tuple[float, float]:
        clean = rng.normal(size=(count, 50))
        loud = np.exp(rng.normal(size=(2, count, 1)))  # how much noise a sample gets differs, and not together
        difference, error = metrics.sqnr_difference_db(clean, *(clean + loud * rng.normal(size=(2, count, 50))))
        assert error is not None
        return difference, error

    found = np.array([drawn(40) for _ in range(300)])
    assert np.sqrt((found[:, 1] ** 2).mean()) == pytest.approx(found[:, 0].std(), rel=0.15)


def test_a_difference_without_an_error():
    """One sample, or none with noise, tells nothing of others."""
    clean = np.ones((3, 2))
    assert metrics.sqnr_difference_db(clean[:1], clean[:1] + 0.1, clean[:1] + 0.1) == (0.0, None)
    assert metrics.sqnr_difference_db(clean, clean, clean) == (0.0, None)
    difference, error = metrics.sqnr_difference_db(clean, clean + 0.1, clean + 0.2)
    assert difference == pytest.approx(20 * np.log10(2)) and error == pytest.approx(0.0, abs=1e-9)
