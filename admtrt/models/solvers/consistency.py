"""Multistep sampling of consistency models (Song et al. 2023, arXiv 2303.01469), Algorithm 1."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

from admtrt.schedule.solvers.consistency import indices_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from admtrt.models.solvers.problem import Problem, State


def consistency(problem: Problem) -> Iterator[State]:
    """Predict, then add noise up to the next level; the last index is never evaluated."""
    levels = problem.levels
    count = problem.sampler.option("levels_of")
    grid = levels.grid("karras", levels.noisiest, levels.cleanest, count - 1)
    chosen = [grid[index] for index in indices_of(problem.sampler)[:-1]]
    if problem.start is not None:
        chosen = [level for level in chosen if level.sigma <= problem.start.sigma * (1 + 1e-9)]
    x_0 = yield from problem.predict(problem.first(chosen[0]), chosen[0])
    for place, level in enumerate(chosen[1:], start=1):
        noise = sqrt(level.sigma**2 - levels.cleanest.sigma**2) * problem.noise(len(chosen) - place)
        x_0 = yield from problem.predict(x_0 + noise, level)
    yield problem.end(x_0, None)
