"""The stochastic sampler of Karras et al. 2022 (arXiv 2206.00364), Algorithm 2, with Heun's or Euler's step.

In EDM's coordinates, x = x_0 + S n with S = sigma / alpha.
"""

from __future__ import annotations

from itertools import pairwise
from math import sqrt
from typing import TYPE_CHECKING

from admtrt.schedule.grid import evaluations, path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from admtrt.models.solvers.problem import Problem, State


def heun(problem: Problem) -> Iterator[State]:
    """Heun: two evaluations per step, one for the step to the image."""
    return _sampler(problem, (evaluations(problem.sampler) + 1) // 2, second=True)


def euler(problem: Problem) -> Iterator[State]:
    """Euler: one evaluation per step."""
    return _sampler(problem, evaluations(problem.sampler), second=False)


def _sampler(problem: Problem, count: int, *, second: bool) -> Iterator[State]:
    sampler, alpha = problem.sampler, problem.alpha
    levels = path(problem.levels, sampler, count, problem.start)
    steps = len(levels) - 1
    left = 2 * steps - (levels[-1] is None) if second else steps
    S_churn, S_tmin, S_tmax, S_noise = sampler.option("churn") or (0.0, 0.0, 0.0, 1.0)
    first = levels[0]
    assert first is not None
    x = first.sigma * problem.x_T
    if problem.image is not None:
        x = x + problem.image
    for level, following in pairwise(levels):
        assert level is not None
        hat = level
        if S_churn and S_tmin <= level.sigma <= S_tmax:
            gamma = min(S_churn / steps, sqrt(2) - 1)
            hat = problem.levels.at_sigma(level.sigma + gamma * level.sigma)
            if sampler.option("sigma") == "rounded":
                hat = problem.levels.rounded(hat)
            if hat.sigma > level.sigma:
                x = x + sqrt(hat.sigma**2 - level.sigma**2) * S_noise * problem.noise(left)
        next_sigma = 0.0 if following is None else following.sigma
        denoised = yield from problem.predict(alpha(hat) * x, hat)
        d = (x - denoised) / hat.sigma
        left -= 1
        x_next = x + (next_sigma - hat.sigma) * d
        if second and following is not None:
            denoised = yield from problem.predict(alpha(following) * x_next, following)
            d_prime = (x_next - denoised) / next_sigma
            left -= 1
            x_next = x + (next_sigma - hat.sigma) * (0.5 * d + 0.5 * d_prime)
        x = x_next
    yield problem.end(alpha(levels[-1]) * x, levels[-1])
