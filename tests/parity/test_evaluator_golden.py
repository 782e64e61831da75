"""Metrics against the ADM evaluator's own numbers and exact arithmetic, on features of the recipe."""

from __future__ import annotations

import time

import numpy as np
import pytest
from evaluator_cases import GOLD, feature_sets, logit_sets

from admtrt.errors import DataError
from admtrt.evaluate.frechet import Gaussian, frechet_distance, half_sample_error, infinite_distance
from admtrt.evaluate.kernel import kernel_distance
from admtrt.evaluate.manifold import manifold_metrics, nearest_images, radii
from admtrt.evaluate.score import inception_score

CASES = GOLD["metrics"]
FINITE = [name for name, case in CASES.items() if case["fid_exact"] is not None]
PLAIN = ("small", "main", "few")


@pytest.mark.parametrize("name", FINITE)
def test_frechet_distance(name: str) -> None:
    """The goldens' bar is 1e-6 of exact arithmetic; the original's float32 means are up to 4e-7 from it."""
    reference, samples = (Gaussian.fit([one]) for one in feature_sets()[name])
    exact = CASES[name]["fid_exact"]
    if name == "identical":
        assert 0 <= frechet_distance(reference, samples) < 1e-9
        return
    assert frechet_distance(reference, samples) == pytest.approx(exact, rel=1e-6)
    stored = Gaussian.from_statistics(reference.mean, reference.covariance, "ref.npz")
    assert frechet_distance(stored, samples) == pytest.approx(exact, rel=1e-6)
    if name not in ("offset", "one_dimension"):  # where the original loses digits, or raises
        assert frechet_distance(reference, samples) == pytest.approx(CASES[name]["fid"], rel=1e-5)


@pytest.mark.parametrize("cuts", [(1,), (599,), (64, 128), (4, 5, 6, 300)])
def test_statistics_do_not_depend_on_how_features_come(cuts: tuple[int, ...]) -> None:
    features = np.tile(feature_sets()["small"][1], (8, 1))  # more than one block
    whole, parts = Gaussian.fit([features]), Gaussian.fit(np.split(features, cuts))
    np.testing.assert_array_equal(whole.root, parts.root)
    np.testing.assert_array_equal(whole.mean, parts.mean)


def test_blocks_merge_to_the_statistics_of_all() -> None:
    """Against NumPy's covariance, whose rounding is 1e-15 here; blocks differ in their means."""
    features = np.concatenate([one + step for step, one in enumerate([feature_sets()["small"][0]] * 15)])
    fitted = Gaussian.fit([features])
    expected = np.cov(features.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(fitted.covariance, expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(fitted.mean, features.mean(axis=0, dtype=np.float64), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "key", "k"),
    [(name, key, k) for name in CASES for key, k in (("exact", 3), ("exact_k5", 5)) if key in CASES[name]],
)
def test_manifold(name: str, key: str, k: int) -> None:
    found, exact = manifold_metrics(*feature_sets()[name], k, k), CASES[name][key]
    assert (found.precision, found.recall, found.coverage) == tuple(
        exact[metric] for metric in ("precision", "recall", "coverage")
    )
    assert found.density == pytest.approx(exact["density"], abs=1e-12)
    if name in PLAIN and k == 3:
        half = CASES[name]["half"]
        assert (found.precision, found.recall) == pytest.approx((half["precision"], half["recall"]), abs=0.01)


@pytest.mark.parametrize("shape", ["collapsed", "few points", "all equal", "one outlier"])
def test_manifold_where_float32_cannot_tell(shape: str) -> None:
    """Against distances by differences in float64, all of them."""
    rng = np.random.default_rng(3)
    reference = rng.standard_normal((300, 40)).astype(np.float32)
    samples = {
        "collapsed": np.repeat(reference[:2], 150, axis=0) + 1e-6 * rng.standard_normal((300, 40)),
        "few points": reference[rng.integers(0, 3, 300)] + np.float32(0.125),
        "all equal": np.tile(reference[7], (300, 1)),
        "one outlier": np.concatenate([reference[1:] * np.float32(1.5), np.full((1, 40), 1e30)]),
    }[shape].astype(np.float32)

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.stack([((row.astype(np.float64) - b) ** 2).sum(axis=1) for row in a])

    across = distances(reference, samples)
    near, wide = (np.sort(distances(reference, reference))[:, k] for k in (3, 5))
    own = np.sort(distances(samples, samples))[:, 3]
    found = manifold_metrics(reference, samples)
    assert found.precision == (across <= near[:, None]).any(axis=0).mean()
    assert found.recall == (across <= own[None]).any(axis=1).mean()
    assert found.coverage == (across <= wide[:, None]).any(axis=1).mean()
    assert found.density == pytest.approx((across <= wide[:, None]).sum() / 5 / 300, abs=1e-12)
    np.testing.assert_array_equal(radii(samples, (3,))[0], own)
    nearest, index = nearest_images(samples, reference)
    np.testing.assert_array_equal(nearest, np.sqrt(across.min(axis=0)))
    np.testing.assert_array_equal(across[index, np.arange(300)], across.min(axis=0))


def test_radii_of_a_reference_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known radii give the same numbers, also for another k, and only the samples' own are computed again."""
    reference, samples = feature_sets()["small"]
    known: dict[int, np.ndarray] = {}
    plain = manifold_metrics(reference, samples)
    few = manifold_metrics(reference, samples[:5])  # density has too few samples
    assert few.density is None
    assert manifold_metrics(reference, samples[:5], known=known) == few
    assert manifold_metrics(reference, samples, known=known) == plain
    seen: list[int] = []
    monkeypatch.setattr(
        "admtrt.evaluate.manifold.radii", lambda one, ks: seen.append(len(one)) or radii(one, ks)
    )
    assert manifold_metrics(reference, samples, known=known) == plain
    assert seen == [len(samples)]


@pytest.mark.parametrize("name", ["three_samples", "one_sample"])
def test_too_few_images_have_no_manifold(name: str) -> None:
    found = manifold_metrics(*feature_sets()[name])
    assert (found.precision, found.recall, found.density, found.coverage) == (None, None, None, None)


def test_four_images_have_three_neighbours_but_not_five() -> None:
    found = manifold_metrics(*feature_sets()["four_samples"])
    exact = CASES["four_samples"]["exact"]
    assert (found.precision, found.recall) == (exact["precision"], exact["recall"])
    assert (found.density, found.coverage) == (None, None)


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(DataError, match="one image"):
        Gaussian.fit([feature_sets()["one_sample"][1]])


@pytest.mark.parametrize("name", list(GOLD["beyond"]))
def test_kernel_distance(name: str) -> None:
    found = kernel_distance(*feature_sets()[name])
    assert found is not None
    assert found[0] == pytest.approx(GOLD["beyond"][name]["kid"], abs=1e-12)


def test_kernel_distance_error() -> None:
    """The jackknife's closed form against leaving every image out in turn."""
    reference, samples = (one[:20] for one in feature_sets()["small"])
    found = kernel_distance(reference, samples)
    assert found is not None

    def without(index: int) -> tuple[float, float]:
        left, right = np.delete(reference, index, axis=0), np.delete(samples, index, axis=0)
        a, b = kernel_distance(left, samples), kernel_distance(reference, right)
        assert a is not None
        assert b is not None
        return a[0], b[0]

    values = np.array([without(index) for index in range(20)])
    assert found[1] == pytest.approx(np.sqrt(19 * np.var(values, axis=0).sum()), rel=1e-9)


@pytest.mark.parametrize("name", list(GOLD["inception_score"]))
def test_inception_score(name: str) -> None:
    case, logits = GOLD["inception_score"][name], logit_sets()[name]
    assert inception_score(logits).value == pytest.approx(case["exact"], rel=1e-9)
    assert inception_score(logits, 1).value == pytest.approx(case["exact_one_part"], rel=1e-9)
    if case["score"] != "nan":
        assert inception_score(logits).value == pytest.approx(case["score"], rel=1e-5)


def test_inception_score_error() -> None:
    """The jackknife's closed form against leaving every image out in turn."""
    logits = logit_sets()["ten_classes"][:30]
    values = [inception_score(np.delete(logits, index, axis=0), 1).value for index in range(30)]
    assert inception_score(logits, 1).error == pytest.approx(np.sqrt(29 * np.var(values)), rel=1e-9)


def test_errors_are_of_the_size_of_what_they_tell() -> None:
    """The spread of twenty sets of 200 samples equals the error estimated from one set, within a third."""
    rng = np.random.default_rng(5)
    mixing = rng.standard_normal((8, 8)) / 3

    def draw(count: int) -> np.ndarray:
        return (rng.standard_normal((count, 8)) @ mixing).astype(np.float32)

    reference = Gaussian.fit([draw(5000)])
    sets = [draw(200) * np.float32(1.3) for _ in range(20)]
    spread = np.std([frechet_distance(Gaussian.fit([one]), reference) for one in sets], ddof=1)
    errors = [half_sample_error(one, reference, 0) for one in sets]
    assert np.mean([error for error in errors if error is not None]) == pytest.approx(spread, rel=1 / 3)


def test_distance_at_infinity_removes_the_bias_of_few_samples() -> None:
    """Samples of the reference's own source are at distance 0; at N = 400 the bias is large."""
    rng = np.random.default_rng(6)
    reference = Gaussian.fit([rng.standard_normal((50_000, 30)).astype(np.float32)])
    samples = rng.standard_normal((400, 30)).astype(np.float32)
    found = infinite_distance(samples, reference, 0)
    assert found is not None
    plain = frechet_distance(Gaussian.fit([samples]), reference)
    assert abs(found[0]) < plain / 4
    assert found[1] > 0


@pytest.mark.parametrize("name", [name for name in FINITE if name != "main"])
def test_every_degenerate_case_takes_less_than_a_second(name: str) -> None:
    """Processor time, the best of three: other processes share the machine."""
    reference, samples = feature_sets()[name]

    def seconds() -> float:
        start = time.process_time()
        fitted = Gaussian.fit([reference])
        frechet_distance(fitted, Gaussian.fit([samples]))
        half_sample_error(samples, fitted, 0)
        manifold_metrics(reference, samples)
        kernel_distance(reference, samples)
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) < 1
