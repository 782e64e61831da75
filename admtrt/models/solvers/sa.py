"""SA-Solver (Xue et al. 2023, arXiv 2309.05019), Algorithm 1, with a constant tau.

The integrals (1 + tau^2) int exp(-(1 + tau^2) (lambda_t - lambda)) l_j d lambda of the Lagrange polynomials
are taken coefficient by coefficient; predictor and corrector share their noise.
"""

from __future__ import annotations

from math import exp, factorial, sqrt
from typing import TYPE_CHECKING

import numpy as np

from admtrt.schedule.multistep import orders_of, steps_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from admtrt.models.solvers.problem import Problem, State

_TERMS = 25


def sa(problem: Problem) -> Iterator[State]:
    """An Adams-Bashforth predictor and an Adams-Moulton corrector on the same evaluations."""
    sampler, alpha, sigma = problem.sampler, problem.alpha, problem.sigma
    levels, last = steps_of(problem.levels, sampler, problem.start)
    steps = len(levels) - 1
    orders = orders_of(sampler, steps, to_zero=levels[-1] is None)
    tau = 1.0 if sampler.option("sde") else 0.0
    assert levels[0] is not None
    x = problem.first(levels[0])
    lambdas: list[float] = []
    predicted: list[Tensor] = []
    for i, p in enumerate(orders):
        s, t = levels[i], levels[i + 1]
        assert s is not None
        if i == 0:
            lambdas.append(s.lam)
            predicted.append((yield from problem.predict(x, s)))
        if t is None:
            x = predicted[-1]
            break
        h = t.lam - s.lam
        base = sigma(t) / sigma(s) * exp(-(tau**2) * h) * x
        if tau:
            left = steps - 1 - i + (last is not None)
            base = base + sigma(t) * sqrt(1 - exp(-2 * tau**2 * h)) * problem.noise(left)
        x = base + alpha(t) * _integral(lambdas[-p:], predicted[-p:], s.lam, t.lam, tau)
        if i + 1 < steps:  # never after the last evaluation
            predicted.append((yield from problem.predict(x, t)))
            lambdas.append(t.lam)
            x = base + alpha(t) * _integral(lambdas[-p - 1 :], predicted[-p - 1 :], s.lam, t.lam, tau)
    if last is not None:
        x = yield from problem.predict(x, last)
    yield problem.end(x, None if last is not None else levels[-1])


def _integral(
    at: Sequence[float], predicted: Sequence[Tensor], start: float, end: float, tau: float
) -> Tensor:
    """(1 + tau^2) int exp((1 + tau^2) (lambda - end)) sum_j l_j(lambda) x_j d lambda."""
    c = 1 + tau**2
    total = 0.0 * predicted[0]
    for j, (own, x_0) in enumerate(zip(at, predicted, strict=True)):
        others = [one for place, one in enumerate(at) if place != j]
        coefficients = np.atleast_1d(np.poly([one - start for one in others]))[::-1]
        coefficients = coefficients / np.prod([own - one for one in others])
        integrals = [_power(k, end - start, c) for k in range(len(at))]
        total = total + float(c * coefficients @ integrals) * x_0
    return total


def _power(k: int, h: float, c: float) -> float:
    """int_0^h exp(c (u - h)) u^k du, by its series in c h where parts would cancel, else by parts."""
    if c * h < 1:
        terms = ((-c * h) ** j * factorial(k) / factorial(k + j + 1) for j in range(_TERMS))
        return float(h ** (k + 1) * sum(terms))
    found = (1 - exp(-c * h)) / c
    for power in range(1, k + 1):
        found = (h**power - power * found) / c
    return found
