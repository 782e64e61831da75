"""DPM-Solver++ (Lu et al. 2022, Algorithms 1 and 2): exponential integrators of the data prediction.

In x~ = x_0 + S eps, for a step from S_s to S_t with h = log(S_s / S_t), e = expm1(-h), m the prediction at s
and m_1,
m_2 those before it, at lambdas that lie r0 h and (r0 + r1) h back::

    order 1:  x~' = S_t/S_s x~ - e m
    order 2:  ... - e/2 D,                        D  = (m - m_1) / r0
    order 3:  ... + p2 D1 - p3 D2,                D' = (m_1 - m_2) / r1,  D1 = D + r0/(r0 + r1) (D - D'),
                                                  D2 = (D - D') / (r0 + r1), p2 = e/h + 1, p3 = p2/h - 1/2

which are the multistep forms as published (D2 lacks a factor 2, so that order 3 converges at order 2). The
singlestep forms evaluate inside of the step instead, at points r1 h and r2 h (:func:`_single`). With ``sde``,
orders 1
and 2, E = 1 - exp(-2h)::

    x~' = S_t/S_s exp(-h) x~ + E m + E/2 D + S_t sqrt(E) z
"""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from admtrt.errors import RequestError
from admtrt.schedule.options import OF_MULTISTEP
from admtrt.schedule.solvers.registry import solver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admtrt.schedule.levels import Level, NoiseLevels
    from admtrt.schedule.options import Grid
    from admtrt.schedule.rows import RowBuilder, Rows
    from admtrt.schedule.sampler import SamplerConfig

_INNER_GRIDS = ("time_uniform", "logsnr", "quadratic", "karras")


@solver(
    "dpmpp",
    source="Lu et al. 2022b, arXiv 2211.01095",
    processes=("discrete", "edm"),
    options={"order": 2, "form": "multi", "sde": False, **OF_MULTISTEP},
)
def dpmpp(levels: NoiseLevels, sampler: SamplerConfig, start: Level | None) -> Rows:
    """Rows of DPM-Solver++."""
    from admtrt.schedule.multistep import multistep_rows
    from admtrt.schedule.rows import RowBuilder

    _check(sampler)
    if sampler.option("form") == "multi":
        weights = _sde_weights if sampler.option("sde") else _weights
        return multistep_rows(levels, sampler, start, weights)
    builder = RowBuilder(levels)
    first = _single(levels, sampler, start, builder)
    return builder.rows(init_scale=levels.start_scale(first, start))


def _check(sampler: SamplerConfig) -> None:
    order, single = sampler.option("order"), sampler.option("form") == "single"
    if sampler.option("sde") and (single or order > 2):
        raise RequestError(
            f"dpmpp adds noise in its multistep form of order 1 or 2, not "
            f"{'in the singlestep form' if single else f'at order {order}'}",
            hint="Leave out --sde, or use --form multi --order 2.",
        )
    if single and order == 1:
        raise RequestError("order 1 has no singlestep form", hint="Leave out --form, or use order 2 or 3.")


def _weights(visited: Sequence[Level], to: Level, order: int) -> dict[str, float]:
    """Weights of x~ and of the predictions at the levels ``visited`` (newest first) in the next x~."""
    h = to.lam - visited[0].lam
    e = math.expm1(-h)
    made = {"x": math.exp(-h), "x0": -e, "h1": 0.0, "h2": 0.0}
    if order == 1:
        return {"x": made["x"], "x0": made["x0"]}
    r0 = (visited[0].lam - visited[1].lam) / h
    if order == 2:
        _add_difference(made, -0.5 * e / r0, 0.0)
        return made
    r1 = (visited[1].lam - visited[2].lam) / h
    p2 = e / h + 1
    p3 = p2 / h - 0.5
    curvature = (p2 * r0 - p3) / (r0 + r1)
    _add_difference(made, (p2 + curvature) / r0, -curvature / r1)
    return made


def _sde_weights(visited: Sequence[Level], to: Level, order: int) -> dict[str, float]:
    h = to.lam - visited[0].lam
    kept = -math.expm1(-2 * h)
    made = {"x": math.exp(-2 * h), "x0": kept, "h1": 0.0, "h2": 0.0, "noise": to.sigma * math.sqrt(kept)}
    if order == 2:
        _add_difference(made, 0.5 * kept * h / (visited[0].lam - visited[1].lam), 0.0)
    return made


def _add_difference(made: dict[str, float], newest: float, older: float) -> None:
    """Add ``newest`` (m - m_1) + ``older`` (m_1 - m_2)."""
    made["x0"] += newest
    made["h1"] += older - newest
    made["h2"] -= older


def _single(levels: NoiseLevels, sampler: SamplerConfig, start: Level | None, builder: RowBuilder) -> Level:
    """The singlestep forms, with c the weight of the last difference.

    Order 2, inner point u: x~_u by order 1; x~' = S_t/S_s x~ - e m_s - e/(2 r1) (m_u - m_s). Order 3, inner
    points u
    and v: x~_v = S_v/S_s x~ - expm1(-r2 h) m_s + r2/r1 (expm1(-r2 h)/(r2 h) + 1) (m_u - m_s), then
    x~' = S_t/S_s x~ - e m_s + p2/r2 (m_v - m_s).
    """
    kind, orders, outer = _outer(levels, sampler, start)
    for (level, to), order in zip(pairwise(outer), orders, strict=True):
        assert level is not None
        if to is None:  # a step of order 1 to the image
            builder.add(level, None, {"x0": 1.0})
            continue
        h = to.lam - level.lam
        e, ratio = math.expm1(-h), math.exp(-h)
        if order == 1:
            builder.add(level, to, {"x": ratio, "x0": -e})
            continue
        inner = levels.grid(kind, level, to, order)[1:-1]
        r = [(point.lam - level.lam) / h for point in inner]
        first = {"x": math.exp(-r[0] * h), "x0": -math.expm1(-r[0] * h)}
        builder.add(level, inner[0], first, keep={"x": 1.0})
        if order == 2:
            c = -0.5 * e / r[0]
            builder.add(inner[0], to, {"saved": ratio, "x0": c, "h1": -e - c})
            continue
        e2 = math.expm1(-r[1] * h)
        c = r[1] / r[0] * (e2 / (r[1] * h) + 1)
        second = {"saved": math.exp(-r[1] * h), "x0": c, "h1": -e2 - c}
        builder.add(inner[0], inner[1], second, keep={"saved": 1.0})
        c = (e / h + 1) / r[1]
        builder.add(inner[1], to, {"saved": ratio, "x0": c, "h2": -e - c})
    if sampler.option("denoise_to_zero"):
        last = outer[-1]
        assert last is not None
        builder.add(last, None, {"x0": 1.0})
    first_level = outer[0]
    assert first_level is not None
    return first_level


def _outer(
    levels: NoiseLevels, sampler: SamplerConfig, start: Level | None
) -> tuple[Grid, list[int], list[Level | None]]:
    """The grid for the inner points, the order of each step, and the levels between steps."""
    from admtrt.schedule.grid import check_distinct, from_start, grid_of, path
    from admtrt.schedule.multistep import steps_of

    kind, order = grid_of(levels, sampler), sampler.option("order")
    if kind not in _INNER_GRIDS:
        raise RequestError(
            f"grid '{kind}' has no levels inside of its steps",
            hint=f"The singlestep form takes the grids {', '.join(_INNER_GRIDS)}.",
        )
    passed, _ = steps_of(levels, sampler, None)
    count = len(passed) - 1
    orders = _single_orders(count, order, to_zero=passed[-1] is None)
    if kind == "logsnr":
        passed = path(levels, sampler, len(orders), None)
    else:
        passed = [passed[index] for index in accumulate(orders, initial=0)]
    check_distinct(passed, sampler)
    if start is not None:
        left = from_start(passed, sampler, start)
        orders, passed = orders[len(passed) - len(left) :], left
    return kind, orders, passed


def _single_orders(count: int, order: int, *, to_zero: bool) -> list[int]:
    """Orders of steps that use ``count`` evaluations in total; a last step to the image has order 1."""
    if order == 2:
        orders = [2] * (count // 2) + [1] * (count % 2)
    elif count % 3:
        orders = [3] * (count // 3) + [count % 3]
    else:
        orders = [3] * (count // 3 - 1) + [2, 1]
    if to_zero and orders[-1] == 2:
        orders[-1:] = [1, 1]
    return orders
