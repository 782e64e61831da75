"""UniPC (Zhao et al. 2023, arXiv 2302.04867): Algorithms 1 and 2 with data prediction."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from admtrt.schedule.multistep import orders_of, steps_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from admtrt.models.solvers.problem import Problem, State

_TERMS = 120


def unipc(problem: Problem) -> Iterator[State]:
    """A predictor and a corrector that share their evaluations."""
    levels, last = steps_of(problem.levels, problem.sampler, problem.start)
    steps = len(levels) - 1
    orders = orders_of(problem.sampler, steps, to_zero=levels[-1] is None)
    assert levels[0] is not None
    x = problem.first(levels[0])
    predicted: list[Tensor] = []
    for i, p in enumerate(orders):
        s, t = levels[i], levels[i + 1]
        assert s is not None
        if i == 0:
            predicted.append((yield from problem.predict(x, s)))
        if t is None:
            x = predicted[-1]
            break
        h = t.lam - s.lam
        B = -h if problem.sampler.option("variant") == "bh1" else math.expm1(-h)
        r, D = [], []
        for j in range(1, p):
            before = levels[i - j]
            assert before is not None
            r.append((before.lam - s.lam) / h)
            D.append((predicted[-1 - j] - predicted[-1]) / r[-1])
        alpha_t = problem.alpha(t)
        base = problem.sigma(t) / problem.sigma(s) * x - alpha_t * math.expm1(-h) * predicted[-1]
        x_t = base - alpha_t * B * _weighted([0.5] if p == 2 else _rho(r, h, B), D)
        if i + 1 < steps:  # never after the last evaluation
            predicted.append((yield from problem.predict(x_t, t)))
            rho = [0.5] if p == 1 else _rho([*r, 1.0], h, B)
            x_t = base - alpha_t * B * _weighted(rho, [*D, predicted[-1] - predicted[-2]])
        x = x_t
    if last is not None:
        x = yield from problem.predict(x, last)
    yield problem.end(x, None if last is not None else levels[-1])


def _weighted(rho: list[float], differences: list[Tensor]) -> Tensor | float:
    return sum((one * D for one, D in zip(rho, differences, strict=True)), 0.0)


def _rho(r: list[float], h: float, B: float) -> list[float]:
    """R_p(h) rho = b, where b_i = i! h phi_{i+1}(-h) / B with phi_k(z) = sum_j z^j / (j + k)!."""
    z = -h
    phi = [math.fsum(z**j / math.factorial(j + k) for j in range(_TERMS)) for k in range(2, len(r) + 2)]
    b = [math.factorial(i + 1) * z * one / B for i, one in enumerate(phi)]
    rows = np.array([[one**i for one in r] for i in range(len(r))])
    found: list[float] = np.linalg.solve(rows, b).tolist() if r else []
    return found
