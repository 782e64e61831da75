"""UniPC (Zhao et al. 2023, Algorithms 1 and 2): every evaluation also corrects the state where it is made.

In x~ = x_0 + S eps, for a step from S_s to S_t with h = log(S_s / S_t), e = expm1(-h), B = -h (``bh1``) or e
(``bh2``), and r_j the distances of the earlier predictions in units of h (negative; 1 for the new one)::

    base       = S_t/S_s x~ - e m
    predicted  = base - B sum_j rho_p[j] (m_j - m) / r_j
    corrected  = base - B (sum_j rho_c[j] (m_j - m) / r_j + rho_c[p] (m_t - m))

The networks are evaluated only at predicted states, so a step costs one evaluation. All terms of the
corrected state except that of m_t are known one row earlier: their sum is ``saved``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from admtrt.schedule.options import OF_MULTISTEP
from admtrt.schedule.solvers.registry import solver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admtrt.schedule.levels import Level, NoiseLevels
    from admtrt.schedule.rows import Rows
    from admtrt.schedule.sampler import SamplerConfig


@solver(
    "unipc",
    source="Zhao et al. 2023, arXiv 2302.04867",
    processes=("discrete", "edm"),
    options={"order": 2, "variant": "bh2", **OF_MULTISTEP},
)
def unipc(levels: NoiseLevels, sampler: SamplerConfig, start: Level | None) -> Rows:
    """Rows of UniPC."""
    from admtrt.schedule.multistep import corrected_rows

    def step(
        visited: Sequence[Level], to: Level, order: int, correction: float
    ) -> tuple[dict[str, float], dict[str, float], float]:
        ratio, predictor, corrector, new = _weights(visited, to, order, sampler.option("variant"))
        state = {"saved" if len(visited) > 1 else "x": ratio}
        return (
            state | _named(predictor, ratio * correction),
            state | _named(corrector, ratio * correction),
            new,
        )

    return corrected_rows(levels, sampler, start, step)


def _named(weights: Sequence[float], more: float) -> dict[str, float]:
    return {"x0": weights[0] + more, "h1": weights[1], "h2": weights[2]}


def _weights(
    visited: Sequence[Level], to: Level, order: int, variant: str
) -> tuple[float, list[float], list[float], float]:
    """Weights of one step. Weights of predictions are ordered from the newest to the oldest.

    Returns:
        The weight of the state; the weights of the predictions in the predicted state, and in the corrected
        state; and the weight of the prediction at ``to`` in the corrected state.
    """
    import numpy as np

    h = to.lam - visited[0].lam
    e = math.expm1(-h)
    big = -h if variant == "bh1" else e
    r = [(visited[j].lam - visited[0].lam) / h for j in range(1, order)] + [1.0]
    b, phi, factorial = [], e / -h - 1, 1.0
    for i in range(1, order + 1):
        b.append(phi * factorial / big)
        factorial *= i + 1
        phi = phi / -h - 1 / factorial
    vandermonde = np.array([[one**i for one in r] for i in range(order)])
    rho_c = [0.5] if order == 1 else np.linalg.solve(vandermonde, b).tolist()
    if order == 2:  # by definition
        rho_p = [0.5]
    else:
        rho_p = np.linalg.solve(vandermonde[:-1, :-1], b[:-1]).tolist() if order > 2 else []
    predicted, corrected = [-e, 0.0, 0.0], [-e, 0.0, 0.0]
    for weights, rho in ((predicted, rho_p), (corrected, rho_c)):
        for j in range(order - 1):
            weights[j + 1] -= big * rho[j] / r[j]
            weights[0] += big * rho[j] / r[j]
    new = -big * rho_c[-1]
    corrected[0] -= new
    return math.exp(-h), predicted, corrected, new
