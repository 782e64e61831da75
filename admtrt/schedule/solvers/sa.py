"""SA-Solver (Xue et al. 2023): stochastic Adams methods, with a corrector that costs no evaluation.

In x~ = x_0 + S eps and l = -log S, with noise of the amount tau and c = 1 + tau^2, a step of h is

    x~' = exp(-c h) x~ + c int exp(-c (h - u)) P(u) du + S_t sqrt(1 - exp(-2 tau^2 h)) z

In the predictor, the polynomial P interpolates the last predictions. In the corrector, it also interpolates
the prediction at the predicted state, and z is the predictor's. tau is 1 with ``sde`` and 0 without. With
``sde``, order 1 is SDE-DPM-Solver++ of order 1 plus the corrector. ``saved`` is the sum of the terms that the
corrector adds to the predicted state, except for the term of the newest prediction.
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

_MEMORY = ("x0", "h1", "h2")
"""The predictions of a row and of the two before it."""


@solver(
    "sa",
    source="Xue et al. 2023, arXiv 2309.05019",
    processes=("discrete", "edm"),
    options={"order": 2, "sde": True, **OF_MULTISTEP},
)
def sa(levels: NoiseLevels, sampler: SamplerConfig, start: Level | None) -> Rows:
    """Rows of SA-Solver."""
    from admtrt.schedule.multistep import corrected_rows

    tau2 = 1.0 if sampler.option("sde") else 0.0

    def step(
        visited: Sequence[Level], to: Level, order: int, correction: float
    ) -> tuple[dict[str, float], dict[str, float], float]:
        h = to.lam - visited[0].lam
        known = [one.lam - visited[0].lam for one in visited[:order]]
        predicted = _weights(known, h, 1 + tau2)
        new, *weights = _weights([h, *known], h, 1 + tau2)
        kept = math.exp(-(1 + tau2) * h)
        state = {"x": kept} if len(visited) == 1 else {"x": kept, "saved": kept}
        made = dict(zip(_MEMORY, predicted, strict=False))
        made["x0"] += kept * correction
        noise = {"noise": to.sigma * math.sqrt(-math.expm1(-2 * h))} if tau2 else {}
        added = [one - other for one, other in zip(weights, predicted, strict=True)]
        return state | made | noise, dict(zip(_MEMORY, added, strict=False)), new

    return corrected_rows(levels, sampler, start, step)


def _weights(points: Sequence[float], h: float, c: float) -> list[float]:
    """Weights of the predictions at these points of l that integrate polynomials exactly.

    With n points, the weighted sum equals c int exp(-c (h - u)) u^k du over [0, h] for every k < n.
    """
    import numpy as np

    integrals = [-math.expm1(-c * h)]
    for k in range(1, len(points)):
        integrals.append(h**k - k / c * integrals[-1])
    # In units of h, so that the powers are near 1.
    powers = np.vander(np.array(points) / h, increasing=True).T
    scaled = [integral / h**k for k, integral in enumerate(integrals)]
    found: list[float] = np.linalg.solve(powers, scaled).tolist()
    return found
