"""The low-pass filter of ILVR as a matrix: bicubic downsampling by a factor, then upsampling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Float64 = NDArray[np.float64]

_A = -0.5
"""Parameter of Keys' cubic kernel, as in MATLAB's imresize, which ILVR's resizer follows."""


def low_pass_matrix(size: int, factor: int) -> Float64:
    """The matrix L such that L x are the low frequencies of a column x, float64 [size, size].

    Args:
        size: a multiple of ``factor``.
        factor: of the reduction.
    """
    small = size // factor
    return bicubic_matrix(small, size) @ bicubic_matrix(size, small)


def bicubic_matrix(size: int, target: int) -> Float64:
    """Bicubic resizing of ``size`` values to ``target``, float64 [target, size].

    Downsampling widens the kernel. Borders are mirrored.
    """
    scale = target / size
    width = min(scale, 1.0)
    reach = math.ceil(2 / width) + 1
    centres = (np.arange(target) + 0.5) / scale - 0.5
    places = np.floor(centres)[:, None].astype(np.int64) + np.arange(-reach, reach + 1)
    weights = _cubic((centres[:, None] - places) * width)
    weights /= weights.sum(axis=1, keepdims=True)
    mirrored = np.concatenate([np.arange(size), np.arange(size)[::-1]])[places % (2 * size)]
    matrix = np.zeros((target, size))
    np.add.at(matrix, (np.arange(target)[:, None], mirrored), weights)
    return matrix


def _cubic(x: Float64) -> Float64:
    x = np.abs(x)
    near = (_A + 2) * x**3 - (_A + 3) * x**2 + 1
    far = _A * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
