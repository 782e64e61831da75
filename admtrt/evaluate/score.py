"""The inception score (Salimans et al. 2016): exp of the mean KL divergence of p(y | image) from its mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from admtrt.evaluate.frechet import Features, Matrix

PART = 5000
"""Images per split in the ADM evaluator: consecutive, not shuffled; a shorter last split counts fully."""


@dataclass(frozen=True)
class Score:
    """Mean of the parts' scores.

    Attributes:
        value: from 1 to the number of classes.
        error: standard error by the delete-one jackknife within each part; None where a part has one image.
        parts: number of splits.
        shortest: number of images of the smallest split.
    """

    value: float
    error: float | None
    parts: int
    shortest: int


def inception_score(logits: Features, parts: int | None = None) -> Score:
    """Score of logits [N, classes], N at least 1.

    Args:
        logits: finite float32. The softmax is taken in float64 from its logarithm: no probability underflows.
        parts: number of equal splits (the first may be one image longer); None for the ADM evaluator's splits
            of :data:`PART` images.
    """
    scores, variances, sizes = [], [], []
    for part in _parts(logits, parts):
        score, variance = _part_score(part)
        scores.append(score)
        variances.append(variance)
        sizes.append(len(part))
    known = [variance for variance in variances if variance is not None]
    error = math.sqrt(sum(known)) / len(scores) if len(known) == len(scores) else None
    return Score(float(np.mean(scores)), error, len(scores), min(sizes))


def _parts(logits: Features, parts: int | None) -> Iterator[Features]:
    if parts is not None:
        yield from np.array_split(logits, min(parts, len(logits)))
        return
    for first in range(0, len(logits), PART):
        yield logits[first : first + PART]


def _part_score(logits: Features) -> tuple[float, float | None]:
    """Score and its jackknife variance."""
    log_p = log_softmax(logits)
    p = np.exp(log_p)
    own = (p * log_p).sum(axis=1)  # minus the entropy of each image
    count, total = len(p), p.sum(axis=0)
    score = math.exp(own.mean() + float(_entropy(total / count)))
    if count < 2:
        return score, None
    rest = np.maximum(total - p, 0) / (count - 1)
    without = np.exp((own.sum() - own) / (count - 1) + _entropy(rest))
    return score, float((count - 1) * np.var(without))


def _entropy(p: Matrix) -> Matrix:
    entropy: Matrix = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)
    return entropy


def log_softmax(logits: Features) -> Matrix:
    """Logarithms of the probabilities, float64 [N, classes]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    log_p: Matrix = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_p
