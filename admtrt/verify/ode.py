"""Solve an ordinary differential equation for many samples, each with its own step size.

Dormand and Prince's pair of orders 5 and 4 (1980), continued from the fifth-order result. A sample's result
does not depend on the rest of its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from admtrt.errors import AdmtrtError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_NODES = np.array([0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1])
_STAGES = (
    np.array([1 / 5]),
    np.array([3 / 40, 9 / 40]),
    np.array([44 / 45, -56 / 15, 32 / 9]),
    np.array([19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729]),
    np.array([9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656]),
    np.array([35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]),
)
_ERROR = np.array([71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40])
"""Weights of the fifth-order result minus the fourth-order one."""
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 5.0
_FIRST = 1e-2  # of the interval
_LEAST = 1e-7  # smallest step, relative to the interval


@dataclass(frozen=True, eq=False)
class Solution:
    """The solution of every sample at the end.

    Attributes:
        y: float64 [N, K].
        error: sum over the steps of the absolute difference of the two orders in each component, [N, K].
        evaluations: number of evaluations of the derivative, int64 [N].
    """

    y: Array
    error: Array
    evaluations: NDArray[np.int64]


def integrate(
    derivative: Callable[[Array, Array], Array],
    y: Array,
    start: float,
    end: float,
    scale: Callable[[Array], Array],
    *,
    progress: Callable[[Array], None] = lambda _: None,
) -> Solution:
    """Integrate dy/ds = derivative(s, y) from ``start`` to a larger ``end``.

    Args:
        derivative: s [N], y [N, K] -> [N, K]; always called with all samples, including finished ones.
        y: initial values, float64 [N, K].
        start, end: the same for all samples.
        scale: s [N] -> [N, K] or broadcastable: the error allowed per step, measured as the root mean square
            over all components.
        progress: called with the s of every sample after each attempt.

    Raises:
        AdmtrtError: if a value is not finite, or the steps would become too small.
    """
    count, length = len(y), end - start
    s, h = np.full(count, float(start)), np.full(count, _FIRST * length)
    error, evaluations = np.zeros_like(y), np.ones(count, np.int64)
    first = derivative(s, y)
    while (left := end - s > 1e-12 * length).any():
        h = np.where(left, np.minimum(h, end - s), 0.0)
        slopes = [first]
        for node, weights in zip(_NODES[1:], _STAGES, strict=True):
            moved = y + h[:, None] * np.tensordot(weights, np.stack(slopes), 1)
            slopes.append(derivative(s + node * h, moved))
        evaluations += 6 * left
        difference = h[:, None] * np.tensordot(_ERROR, np.stack(slopes), 1)
        size = np.sqrt(np.mean((difference / scale(s)) ** 2, axis=1))
        if not np.isfinite(size).all():
            raise AdmtrtError(
                "the solution of the equation is not finite", hint="Check the network's weights."
            )
        accepted = left & (size <= 1)
        y = np.where(accepted[:, None], moved, y)
        first = np.where(accepted[:, None], slopes[-1], first)
        error += np.where(accepted[:, None], np.abs(difference), 0.0)
        s = np.where(accepted, s + h, s)
        h = h * np.clip(_SAFETY * np.maximum(size, 1e-10) ** -0.2, _SHRINK, _GROW)
        progress(s)
        if (h[left & ~accepted] < _LEAST * length).any():
            raise AdmtrtError(
                "the solver's steps become too small",
                hint="The network rounds more coarsely than that, or is not smooth: raise the tolerance.",
            )
    return Solution(y, error, evaluations)
