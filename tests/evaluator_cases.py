"""The evaluator goldens' sets of features and logits, rebuilt from the recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import evaluator_recipe as recipe
import numpy as np
from goldens import metadata

GOLD: dict[str, Any] = metadata("evaluator")
SALT: str = GOLD["salt"]
LOGITS = {
    "ten_classes": ("ten", 4.0),
    "one_image_over": ("over", 4.0),
    "two_parts": ("two", 4.0),
    "many_classes": ("many", 8.0),
    "certain": ("certain", 200.0),
}


def short_hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


@cache
def feature_sets() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reference and samples of every case; the hash of each is checked."""
    sets = {name: (a, b) for name, a, b in _feature_sets()}
    for name, pair in sets.items():
        assert [short_hash(one) for one in pair] == GOLD["metrics"][name]["sha256"], name
    assert set(sets) == set(GOLD["metrics"])
    return sets


def _feature_sets() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    shapes = {name: (case["reference"], case["sample"]) for name, case in GOLD["metrics"].items()}
    for name, (scale, shift) in (("small", (0.9, 0.05)), ("main", (0.95, 0.03)), ("few", (0.9, 0.05))):
        of_reference, of_samples = shapes[name]
        a = recipe.features(SALT, f"{name}.ref", *of_reference)
        b = recipe.features(SALT, f"{name}.sample", *of_samples, scale=scale, shift=shift)
        yield name, a, b
        if name == "small":
            reference, samples = a, b
    count, size = samples.shape
    yield "identical", reference, reference
    yield "apart", reference, samples + np.float32(20)
    modes = np.repeat(reference[:5], count // 5, axis=0)
    noise = recipe.z(SALT, "collapse", (count // 5 * 5, size))
    yield "collapse", reference, modes + np.float32(0.01) * noise
    a, b = reference.copy(), samples.copy()
    a[:, :8] = b[:, :8] = 1
    yield "constant_columns", a, b
    b = samples.copy()
    b[:, 8:16] = 1
    yield "constant_in_sample", reference, b
    yield "large", reference * np.float32(100), samples * np.float32(100)
    yield "offset", reference + np.float32(1000), samples + np.float32(1000)
    yield "repeated", reference, np.repeat(reference[: count // 4], 4, axis=0)
    yield "one_dimension", reference[:, :1], samples[:, :1]
    for name, kept in (("four_samples", 4), ("three_samples", 3), ("one_sample", 1)):
        yield name, reference, samples[:kept]
    for name, value in (("nan", np.nan), ("infinity", np.inf)):
        b = samples.copy()
        b[17, 3] = value
        yield name, reference, b


@cache
def logit_sets() -> dict[str, np.ndarray]:
    """Every case of the inception score; the hash of each is checked."""
    cases = GOLD["inception_score"]
    sets = {
        name: recipe.logits(SALT, f"is.{short}", *cases[name]["shape"], strength)
        for name, (short, strength) in LOGITS.items()
    }
    two = sets["two_parts"]
    sets["two_parts_sorted"] = two[np.argsort(two.argmax(1), kind="stable")]
    sets["uniform"] = np.zeros((100, 10), np.float32)
    sets["one_image"] = two[:1]
    assert {name: short_hash(logits) for name, logits in sets.items()} == {
        name: case["sha256"] for name, case in cases.items()
    }
    return sets
