"""Heun and Euler in the form of Karras et al. 2022 (Algorithm 2), with churn.

In x~ = x_0 + S eps, for a step from S (raised by churn from the level before) to S' with h = S' - S::

    Euler:  x~' = (1 + h/S) x~ - h/S m
    Heun:   Euler to S', then x~'' = x~ + h/2 ((x~ - m)/S + (x~' - m')/S')

A step to the image itself is an Euler step. A step's churn noise is added at the end of the previous row;
that of the first step, to the first state.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from admtrt.errors import RequestError
from admtrt.schedule.solvers.registry import solver

if TYPE_CHECKING:
    from admtrt.schedule.levels import Level, NoiseLevels
    from admtrt.schedule.rows import Rows
    from admtrt.schedule.sampler import SamplerConfig

_OPTIONS = {
    "grid": "karras", "to": "zero", "threshold": "static", "threshold_max": None,
    "threshold_order": "after_guide", "sigma": "interpolated", "churn": None,
}  # fmt: skip
_SOURCE = "Karras et al. 2022, arXiv 2206.00364, Algorithm 2"
_MOST_CHURN = math.sqrt(2) - 1  # per step, as published


@solver(
    "heun",
    source=_SOURCE,
    processes=("discrete", "edm"),
    options=_OPTIONS,
    default_steps="25",
    edm_steps="35",  # 18 levels, as Karras et al. 2022
    own_of="diffusion",
)
def heun(levels: NoiseLevels, sampler: SamplerConfig, start: Level | None) -> Rows:
    """Rows of Heun's method: two per step, one for a step to the image."""
    from admtrt.schedule.grid import evaluations

    asked, to_zero = evaluations(sampler), sampler.option("to") == "zero"
    if asked % 2 != to_zero:
        odd = "an odd" if to_zero else "an even"
        neighbours = [str(count) for count in (asked - 1, asked + 1) if count > 0]
        raise RequestError(
            f"heun spends {odd} number of evaluations to "
            f"{'zero' if to_zero else 'the smallest noise level'}, not {asked}",
            hint=f"Ask for {' or '.join(neighbours)}.",
        )
    return _rows(levels, sampler, start, (asked + 1) // 2, corrects=True)


@solver("euler", source=_SOURCE, processes=("discrete", "edm"), options=_OPTIONS, default_steps="25")
def euler(levels: NoiseLevels, sampler: SamplerConfig, start: Level | None) -> Rows:
    """Rows of Euler's method: one per step."""
    from admtrt.schedule.grid import evaluations

    return _rows(levels, sampler, start, evaluations(sampler), corrects=False)


def _rows(
    levels: NoiseLevels, sampler: SamplerConfig, start: Level | None, steps: int, *, corrects: bool
) -> Rows:
    from admtrt.schedule.grid import path
    from admtrt.schedule.rows import RowBuilder

    passed = path(levels, sampler, steps, start)
    amount, low, high, factor = sampler.option("churn") or (0.0, 0.0, math.inf, 1.0)
    raised, extra = [], []
    for level in passed[:-1]:
        assert level is not None  # only the last may be the image
        gamma = min(amount / (len(passed) - 1), _MOST_CHURN) if low <= level.sigma <= high else 0.0
        hat = levels.at_sigma(level.sigma * (1 + gamma)) if gamma else level
        if gamma and sampler.option("sigma") == "rounded":
            hat = levels.rounded(hat)
        raised.append(hat)
        extra.append(math.sqrt(max(hat.sigma**2 - level.sigma**2, 0.0)) * factor)
    builder = RowBuilder(levels)
    for index, (hat, (_, to)) in enumerate(zip(raised, pairwise(passed), strict=True)):
        last = index + 1 == len(raised)
        then = to if last else raised[index + 1]
        noise = 0.0 if last else extra[index + 1]
        if to is None:
            builder.add(hat, None, {"x0": 1.0})
        elif not corrects:
            q = (to.sigma - hat.sigma) / hat.sigma
            builder.add(hat, then, {"x": 1 + q, "x0": -q, "noise": noise})
        else:
            q = (to.sigma - hat.sigma) / hat.sigma
            builder.add(hat, to, {"x": 1 + q, "x0": -q}, keep={"x": 1 + q / 2, "x0": -q / 2})
            q = (to.sigma - hat.sigma) / (2 * to.sigma)
            builder.add(to, then, {"saved": 1.0, "x": q, "x0": -q, "noise": noise})
    first, scale = passed[0], levels.c_in(raised[0])
    assert first is not None
    return builder.rows(init_scale=scale * first.sigma, init_noise=scale * extra[0])
