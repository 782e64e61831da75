"""Diversity: how far the samples of a class lie apart, relative to real images of that class."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from admtrt.evaluate.frechet import Features
    from admtrt.evaluate.images import Labels


def diversity(
    samples: Features, labels: Labels, reference: Features, reference_labels: Labels
) -> tuple[float, float] | None:
    """Ratio of the root mean square distances between two images of a class, and its standard error.

    1 is as diverse as the reference, 0 means that all samples of a class are equal. Classes count equally.
    The mean over all pairs is twice the variance of the class, so that no pair has to be formed.

    Args:
        samples: float32 [N, D].
        labels: class of each sample, [N].
        reference: float32 [M, D].
        reference_labels: class of each reference image, [M].

    Returns:
        None if no class has two images on both sides, or the reference's images are all equal. The error
        covers the choice of samples.
    """
    ours, theirs, errors = [], [], []
    for label in np.intersect1d(labels, reference_labels):
        found, real = _squares(samples[labels == label]), _squares(reference[reference_labels == label])
        if min(len(found), len(real)) < 2:
            continue
        ours.append(found.sum() / (len(found) - 1))
        theirs.append(real.sum() / (len(real) - 1))
        errors.append(found.var(ddof=1) / len(found))
    if not any(theirs):
        return None
    mean, real_mean = float(np.mean(ours)), float(np.mean(theirs))
    value = math.sqrt(mean / real_mean)
    error = math.sqrt(sum(errors)) / len(errors)  # of the mean of the classes' variances
    return value, value * error / (2 * mean) if mean else 0.0


def _squares(features: Features) -> NDArray[np.float64]:
    """Squared distance of every row from the mean of all rows."""
    centred = features - features.mean(axis=0, dtype=np.float64)
    return np.asarray((centred**2).sum(axis=1))
