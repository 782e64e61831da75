"""The metric `diversity`, against all pairs of images and against its own spread."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from admtrt.evaluate.diversity import diversity


def images(seed: int, count: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, 6] of three classes, each with its own mean and twice the spread of the last."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    noise = rng.standard_normal((count, 6)) * spread * 2.0 ** labels[:, None]
    return (100.0 * labels[:, None] + noise).astype(np.float32), labels


def squared(features: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes of the mean squared distance of all pairs of a class."""
    means = []
    for label in np.unique(labels):
        rows = features[labels == label].astype(np.float64)
        means.append(np.mean([((a - b) ** 2).sum() for a, b in combinations(rows, 2)]))
    return float(np.mean(means))


def test_all_pairs_of_a_class() -> None:
    samples, reference = images(0, 60, 0.5), images(1, 80)
    found = diversity(*samples, *reference)
    assert found is not None
    assert found[0] == pytest.approx((squared(*samples) / squared(*reference)) ** 0.5, rel=1e-6)


def test_its_error_is_the_spread_of_its_values() -> None:
    """Over 300 draws the standard deviation itself has an error of 4%."""
    reference = images(0, 2000)
    found = [diversity(*images(seed, 200, 0.7), *reference) for seed in range(1, 301)]
    values, errors = np.array(found).T
    assert values.mean() == pytest.approx(0.7, rel=0.02)
    assert np.median(errors) == pytest.approx(values.std(ddof=1), rel=0.15)


def test_classes_without_pairs_do_not_count() -> None:
    samples, labels = images(0, 60)
    more = np.concatenate([samples, samples[:1] + 1e6])
    plain = diversity(samples, labels, samples, labels)
    assert diversity(more, np.append(labels, 7), samples, labels) == plain  # one sample of class 7
    assert diversity(samples, labels, more, np.append(labels, 7)) == plain
    assert plain is not None
    assert plain[0] == 1.0


def test_equal_samples_have_none() -> None:
    reference = images(0, 60)
    equal = np.ones((20, 6), np.float32)
    assert diversity(equal, np.zeros(20, int), *reference) == (0.0, 0.0)
    assert diversity(*reference, equal, np.zeros(20, int)) is None
    assert diversity(equal, np.full(20, 9), *reference) is None  # no class of the reference
