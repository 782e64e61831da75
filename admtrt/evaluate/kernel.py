"""KID: the unbiased squared maximum mean discrepancy with a cubic kernel (Bińkowski et al. 2018)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from admtrt.evaluate.frechet import Features, Matrix

MAX_IMAGES = 10_000
"""The most images per set, drawn from larger sets: the cost grows with the number of pairs."""
_BLOCK = 2048


def kernel_distance(reference: Features, samples: Features) -> tuple[float, float | None] | None:
    """KID of samples [N, D] against a reference [M, D], and its standard error.

    The kernel is (x . y / D + 1)^3 over all pairs of different images. The error is the delete-one
    jackknife's, over both sets; It is None if either set has fewer than three images. The result is None if
    either has one image.
    """
    m, n = len(reference), len(samples)
    if min(m, n) < 2:
        return None
    xx, yy = _row_sums(reference, reference), _row_sums(samples, samples)
    xy, yx = _row_sums(reference, samples), _row_sums(samples, reference)
    within_x, within_y, across = xx.sum(), yy.sum(), xy.sum()

    def value(xs: Matrix, nx: int, ys: Matrix, ny: int, between: Matrix) -> Matrix:
        return xs / (nx * (nx - 1)) + ys / (ny * (ny - 1)) - 2 * between / (nx * ny)

    kid = float(value(within_x, m, within_y, n, across))
    if min(m, n) < 3:
        return kid, None
    without_x = value(within_x - 2 * xx, m - 1, within_y, n, across - xy)
    without_y = value(within_x, m, within_y - 2 * yy, n - 1, across - yx)
    variance = (m - 1) * np.var(without_x) + (n - 1) * np.var(without_y)
    return kid, math.sqrt(float(variance))


def _row_sums(a: Features, b: Features) -> NDArray[np.float64]:
    """Row sums of the kernel between two sets; within one set, without the diagonal."""
    sums = np.zeros(len(a))
    for i in range(0, len(a), _BLOCK):
        x = a[i : i + _BLOCK].astype(np.float64)
        for j in range(0, len(b), _BLOCK):
            products = x @ b[j : j + _BLOCK].astype(np.float64).T
            products /= a.shape[1]
            products += 1
            kernel = products * products
            kernel *= products
            if a is b and i == j:
                np.fill_diagonal(kernel, 0)
            sums[i : i + _BLOCK] += kernel.sum(axis=1)
    return sums
