"""FID, KID, precision and recall against their definitions, and the width of their intervals against the spread."""

from __future__ import annotations

import numpy as np
import pytest

from mpq_compiler.evaluation import distances, metrics


def drawn(seed: int, count: int = 40, dimensions: int = 6, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Features of a reference, and those of images from the same noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, dimensions))
    return x, 0.8 * x + 0.3 + noise * rng.normal(size=x.shape)


@pytest.mark.parametrize("dimensions", [6, 40, 90], ids=["more images", "as many", "more features"])
def test_fid_is_the_frechet_distance_of_the_gaussians(dimensions):
    x, y = drawn(0, dimensions=dimensions)
    expected = metrics.frechet(*metrics.gaussian(x), *metrics.gaussian(y))
    assert distances.fid(x, y) == pytest.approx(expected, rel=1e-5)
    assert distances.fid(x, x) == pytest.approx(0, abs=1e-9)
    assert distances.fid(x, x + 2) == pytest.approx(4 * dimensions)


def test_kid_by_its_definition():
    x, y = drawn(0, count=5)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / 6 + 1) ** 3

    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    expected = sum(k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs) / 20
    assert distances.kid(x, y) == pytest.approx(expected)
    assert distances.kid(x, x) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("noise", [0.0, 1.0], ids=["of the same noise", "of noise of their own"])
def test_kid_is_unbiased_where_fid_is_not(noise):
    """Sets of one distribution, whether or not image i of one is like image i of the other."""
    found, rng = [], np.random.default_rng(0)
    for _ in range(300):
        x, other = rng.normal(size=(2, 20, 6))
        y = np.sqrt(1 - noise) * x[:, ::-1] + np.sqrt(noise) * other
        found.append((distances.kid(x, y), distances.fid(x, y)))
    kids, fids = np.array(found).T
    assert abs(kids.mean()) < 3 * kids.std() / np.sqrt(len(kids))
    assert fids.mean() > 1


def test_precision_and_recall_by_hand():
    """On a line: the third neighbour of 0 is 3 away, as that of 3; of 1 and 2 it is 2 away; of 9 it is 8."""
    line = np.array([0.0, 1.0, 2.0, 3.0, 9.0])[:, None]
    assert distances.precision(line, np.array([-3.0, -3.1, 6.0, 0.5, 17.5])[:, None]) == pytest.approx(3 / 5)
    assert distances.recall(line, line + 100) == 0 and distances.precision(line, line) == 1
    same = np.ones((5, 3)) / 3
    assert distances.precision(same, same) == 1 and distances.precision(same, same + 1e-3) == 0


def test_coverage_that_is_lost_is_recall_alone():
    rng = np.random.default_rng(0)
    everywhere = rng.normal(size=(100, 4))
    few = everywhere[:1] + 0.01 * rng.normal(size=(100, 4))
    assert distances.precision(everywhere, few) == 1 and distances.recall(everywhere, few) < 0.05


@pytest.mark.parametrize("name", ["fid", "kid", "precision"])
def test_intervals_are_as_wide_as_other_noise_makes_them(name):
    """The jackknife's deviation is that of the figure over many draws; next to no difference makes it wider."""
    metric, noise = distances.METRICS[name], 1.2 if name == "precision" else 0.3
    values = [metric(*drawn(seed, noise=noise)) for seed in range(200)]
    told = [distances.deviation(metric, *drawn(seed, noise=noise)) for seed in range(8)]
    assert np.std(values) > 0 and 0.7 < np.mean(told) / np.std(values) < 1.6


def test_all_distances_together():
    x, y = drawn(1)
    found = distances.compare(x, y)
    assert found["dimensions"] == 6
    for name, metric in distances.METRICS.items():
        assert found[name]["value"] == metric(x, y)
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    assert found == distances.compare(x, y)
    equal = distances.compare(x, x)
    assert equal["precision"]["value"] == equal["precision"]["high"] == 1 and 0.8 < equal["precision"]["low"] < 1
    assert "low" not in distances.compare(x[:7], y[:7])["fid"]
    few = distances.compare(x[:3], y[:3])
    assert few["precision"] is few["recall"] is None and few["kid"]["value"] == distances.kid(x[:3], y[:3])
    assert distances.compare(x[:1], y[:1])["fid"] is None
