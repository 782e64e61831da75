"""DPM-Solver++ (Lu et al. 2022b, arXiv 2211.01095) as published: multistep, singlestep and SDE forms.

h is the step in lambda = log(alpha / sigma), phi_1 = exp(-h) - 1, phi_2 = phi_1 / h + 1,
phi_3 = phi_2 / h - 1/2.
"""

from __future__ import annotations

from math import exp, expm1, sqrt
from typing import TYPE_CHECKING

from admtrt.schedule.grid import from_start, grid_of, path
from admtrt.schedule.multistep import orders_of, steps_of

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from torch import Tensor

    from admtrt.models.solvers.problem import Problem, State
    from admtrt.schedule.levels import Level
    from admtrt.schedule.options import Grid


def dpmpp(problem: Problem) -> Iterator[State]:
    """All forms."""
    return _singlestep(problem) if problem.sampler.option("form") == "single" else _multistep(problem)


def _multistep(problem: Problem) -> Iterator[State]:
    sampler = problem.sampler
    levels, last = steps_of(problem.levels, sampler, problem.start)
    steps = len(levels) - 1
    orders = orders_of(sampler, steps, to_zero=levels[-1] is None)
    assert levels[0] is not None
    x = problem.first(levels[0])
    predicted: list[Tensor] = []
    for i in range(steps):
        s, t = levels[i], levels[i + 1]
        assert s is not None
        predicted.append((yield from problem.predict(x, s)))
        if t is None:
            x = predicted[-1]
        elif sampler.option("sde"):
            left = steps - 1 - i + (last is not None)
            x = _sde_step(problem, x, levels[: i + 2], predicted, orders[i], left)
        else:
            x = _multistep_step(problem, x, levels[: i + 2], predicted, orders[i])
    if last is not None:
        x = yield from problem.predict(x, last)
    yield problem.end(x, None if last is not None else levels[-1])


def _multistep_step(
    problem: Problem, x: Tensor, levels: list[Level | None], predicted: list[Tensor], order: int
) -> Tensor:
    """Algorithm 2 for order 2, and the third-order form of its authors' code."""
    *_, s, t = levels
    lambdas = [level.lam for level in levels if level is not None]
    alpha_t, ratio = problem.alpha(t), problem.sigma(t) / problem.sigma(s)
    h = lambdas[-1] - lambdas[-2]
    if order == 1:
        return ratio * x - alpha_t * expm1(-h) * predicted[-1]
    r = (lambdas[-2] - lambdas[-3]) / h
    if order == 2:
        D = (1 + 1 / (2 * r)) * predicted[-1] - 1 / (2 * r) * predicted[-2]
        return ratio * x - alpha_t * expm1(-h) * D
    r_1 = (lambdas[-3] - lambdas[-4]) / h
    phi_1 = expm1(-h)
    phi_2 = phi_1 / h + 1
    phi_3 = phi_2 / h - 0.5
    D1_0 = (predicted[-1] - predicted[-2]) / r
    D1_1 = (predicted[-2] - predicted[-3]) / r_1
    D1 = D1_0 + r / (r + r_1) * (D1_0 - D1_1)
    D2 = (D1_0 - D1_1) / (r + r_1)
    return ratio * x - alpha_t * phi_1 * predicted[-1] + alpha_t * phi_2 * D1 - alpha_t * phi_3 * D2


def _sde_step(
    problem: Problem, x: Tensor, levels: list[Level | None], predicted: list[Tensor], order: int, left: int
) -> Tensor:
    """SDE-DPM-Solver++, midpoint."""
    *_, s, t = levels
    lambdas = [level.lam for level in levels if level is not None]
    h = lambdas[-1] - lambdas[-2]
    D = predicted[-1]
    if order == 2:
        r = (lambdas[-2] - lambdas[-3]) / h
        D = D + 0.5 * (predicted[-1] - predicted[-2]) / r
    kept = 1 - exp(-2 * h)
    noise = problem.sigma(t) * sqrt(kept) * problem.noise(left)
    return problem.sigma(t) / problem.sigma(s) * exp(-h) * x + problem.alpha(t) * kept * D + noise


def _singlestep(problem: Problem) -> Iterator[State]:
    """Algorithm 1 and its third-order version; inner points are levels of the grid."""
    orders, levels, kind = _outer(problem)
    assert levels[0] is not None
    x = problem.first(levels[0])
    for order, s, t in zip(orders, levels[:-1], levels[1:], strict=True):
        assert s is not None
        m_s = yield from problem.predict(x, s)
        if t is None:
            x = m_s
            continue
        inner = problem.levels.grid(kind, s, t, order)[1:-1]
        x = yield from _inner_steps(problem, x, m_s, s, inner, t)
    if problem.sampler.option("denoise_to_zero"):
        assert levels[-1] is not None
        x = yield from problem.predict(x, levels[-1])
        levels[-1] = None
    yield problem.end(x, levels[-1])


def _inner_steps(
    problem: Problem, x: Tensor, m_s: Tensor, s: Level, inner: list[Level], t: Level
) -> Generator[State, None, Tensor]:
    h = t.lam - s.lam
    r = [(point.lam - s.lam) / h for point in inner]
    sigma, alpha = problem.sigma, problem.alpha
    phi_1 = expm1(-h)
    to_t = sigma(t) / sigma(s) * x - alpha(t) * phi_1 * m_s
    if not inner:
        return to_t
    u = inner[0]
    x_u = sigma(u) / sigma(s) * x - alpha(u) * expm1(-r[0] * h) * m_s
    m_u = yield from problem.predict(x_u, u)
    if len(inner) == 1:
        return to_t - alpha(t) * phi_1 / (2 * r[0]) * (m_u - m_s)
    v = inner[1]
    phi_1v = expm1(-r[1] * h)
    phi_2v = phi_1v / (r[1] * h) + 1
    x_v = sigma(v) / sigma(s) * x - alpha(v) * phi_1v * m_s + r[1] / r[0] * alpha(v) * phi_2v * (m_u - m_s)
    m_v = yield from problem.predict(x_v, v)
    return to_t + alpha(t) * (phi_1 / h + 1) / r[1] * (m_v - m_s)


def _outer(problem: Problem) -> tuple[list[int], list[Level | None], Grid]:
    """Split the evaluations into orders like the authors' code, and return the levels between."""
    sampler, order = problem.sampler, problem.sampler.option("order")
    kind = grid_of(problem.levels, sampler)
    fine, _ = steps_of(problem.levels, sampler, None)
    orders: list[int] = []
    left = len(fine) - 1
    while left:
        orders.append(min(order, left))
        left -= orders[-1]
    if order == 3 and orders[-1] == 3:  # a last step of order 3 would end too close to the data
        orders[-1:] = [2, 1]
    if fine[-1] is None and orders[-1] == 2:
        orders[-1:] = [1, 1]
    if kind == "logsnr":
        levels = path(problem.levels, sampler, len(orders), None)
    else:
        levels = [fine[sum(orders[:k])] for k in range(len(orders) + 1)]
    if problem.start is not None:
        levels = from_start(levels, sampler, problem.start)
        orders = orders[len(orders) + 1 - len(levels) :]
    return orders, levels, kind
