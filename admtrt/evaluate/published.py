"""The ADM evaluator's numbers for one published batch, to check a whole installation against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from admtrt.evaluate.compare import Value


class Expected(NamedTuple):
    """A published value and the tolerance for this evaluator."""

    value: float
    tolerance: float


BATCH = "admnet_guided_upsampled_imagenet256.npz against VIRTUAL_imagenet256_labeled.npz"
"""The files, as named in guided-diffusion's README of the evaluations."""
PUBLISHED = {
    "fid": Expected(3.9426, 0.005),
    "sfid": Expected(6.1404, 0.005),
    "inception_score": Expected(215.84, 0.5),
    "precision": Expected(0.8265, 0.004),
    "recall": Expected(0.5309, 0.004),
}
"""The published precision and recall used float16 distances, which change them by up to 0.004."""


def self_check(metrics: Mapping[str, Value]) -> dict[str, Any]:
    """Compare each published value with the result; ``passed`` if all agree."""
    rows = {}
    for name, expected in PUBLISHED.items():
        found = metrics[name].value if name in metrics else None
        rows[name] = {
            "value": found,
            "expected": expected.value,
            "tolerance": expected.tolerance,
            "passed": found is not None and abs(found - expected.value) <= expected.tolerance,
        }
    return {"batch": BATCH, "passed": all(row["passed"] for row in rows.values()), "metrics": rows}
