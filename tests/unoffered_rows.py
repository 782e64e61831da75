"""Rows of published solvers that are not offered, for their goldens: the update graph can express them, too.

Noise-prediction DPM-Solver, the ``taylor`` and ``heun`` variants of DPM-Solver++, its authors' own time,
UniPC without the clip at the noisiest levels, and three samplers of consistency_models.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from admtrt.schedule.grid import path
from admtrt.schedule.levels import DiscreteLevels, NoiseLevels
from admtrt.schedule.multistep import multistep_rows
from admtrt.schedule.rows import RowBuilder, Rows
from admtrt.schedule.solvers import SOLVERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admtrt.schedule.levels import Level
    from admtrt.schedule.sampler import SamplerConfig

Case = dict[str, Any]


def rows_of(case: Case, levels: NoiseLevels, sampler: SamplerConfig) -> Rows:
    """The rows of a case of ``tests/data/solvers.json`` that none of our samplers covers."""
    if case["family"] == "consistency":
        form = {"dpm": midpoint, "ancestral": ancestral, "progdist": euler_to_minimum}[case["sampler"]]
        return form(levels, case)
    if case.get("algorithm") == "dpmsolver":
        return noise_prediction(levels, sampler)
    if "published_time" in case:
        return published_time(levels, sampler)
    if case["family"] == "unipc":
        return unclipped(levels, sampler)
    if case.get("method") == "singlestep":
        return taylor_single(levels, case["steps"])
    weights = taylor_weights if case["solver_type"] == "taylor" else sde_heun_weights
    return multistep_rows(levels, sampler, None, weights)


def taylor_weights(visited: Sequence[Level], to: Level, order: int) -> dict[str, float]:
    """Weights of the ``taylor`` variant of DPM-Solver++(2M)."""
    h = to.lam - visited[0].lam
    e = math.expm1(-h)
    if order == 1:
        return {"x": math.exp(-h), "x0": -e}
    of_difference = (e / h + 1) * h / (visited[0].lam - visited[1].lam)
    return {"x": math.exp(-h), "x0": of_difference - e, "h1": -of_difference}


def sde_heun_weights(visited: Sequence[Level], to: Level, order: int) -> dict[str, float]:
    """Weights of the ``heun`` variant of SDE-DPM-Solver++(2M)."""
    h = to.lam - visited[0].lam
    kept = 1 - math.exp(-2 * h)
    made = {"x": math.exp(-2 * h), "x0": kept, "noise": to.sigma * math.sqrt(kept)}
    if order == 2:
        of_difference = (1 - kept / (2 * h)) * h / (visited[0].lam - visited[1].lam)
        made |= {"x0": kept + of_difference, "h1": -of_difference}
    return made


def taylor_single(levels: NoiseLevels, evaluations: int) -> Rows:
    """DPM-Solver++(3S) of 3 n + 2 evaluations, to the smallest level; its last step is of order 2."""
    builder = RowBuilder(levels)
    grid = levels.grid("time_uniform", levels.noisiest, levels.cleanest, evaluations)
    orders = [3] * (evaluations // 3) + [2]
    for step, order in enumerate(orders):
        s, to = grid[3 * step], grid[3 * step + order]
        h = to.lam - s.lam
        e, inner = math.expm1(-h), levels.grid("time_uniform", s, to, order)[1:-1]
        r = [(point.lam - s.lam) / h for point in inner]
        p2 = e / h + 1
        first = {"x": math.exp(-r[0] * h), "x0": -math.expm1(-r[0] * h)}
        builder.add(s, inner[0], first, keep={"x": 1.0})
        if order == 2:
            last = {"saved": math.exp(-h), "h1": -e - p2 / r[0], "x0": p2 / r[0]}
            builder.add(inner[0], to, last)
            continue
        e2 = math.expm1(-r[1] * h)
        c = r[1] / r[0] * (e2 / (r[1] * h) + 1)
        second = {"saved": math.exp(-r[1] * h), "x0": c, "h1": -e2 - c}
        builder.add(inner[0], inner[1], second, keep={"saved": 1.0})
        p3, apart = p2 / h - 0.5, r[1] - r[0]
        # p2 D1 - p3 D2 of D1 = (r2 D10 - r1 D11) / apart and D2 = 2 (D11 - D10) / apart, which are of
        # D10 = (h1 - h2) / r1 and D11 = (m - h2) / r2.
        d10 = (p2 * r[1] + 2 * p3) / apart / r[0]
        d11 = -(p2 * r[0] + 2 * p3) / apart / r[1]
        builder.add(inner[1], to, {"saved": math.exp(-h), "x0": d11, "h1": d10, "h2": -e - d10 - d11})
    return builder.rows(init_scale=1.0)


def noise_prediction(levels: NoiseLevels, sampler: SamplerConfig) -> Rows:
    """DPM-Solver(2M), which stores eps in ``saved``; full order at the end."""
    builder, passed = RowBuilder(levels), path(levels, sampler, int(sampler.steps), None)
    before = None
    for s, to in pairwise(passed):
        assert s is not None
        assert to is not None
        moved = to.sigma - s.sigma
        ahead = 0.0 if before is None else (to.lam - s.lam) / (2 * (s.lam - before.lam))
        q = moved * (1 + ahead) / s.sigma
        weights = {"x": 1 + q, "x0": -q, "saved": -moved * ahead}
        builder.add(s, to, weights, keep={"x": 1 / s.sigma, "x0": -1 / s.sigma})
        before = s
    return builder.rows(init_scale=1.0)


def published_time(levels: NoiseLevels, sampler: SamplerConfig) -> Rows:
    """2M as its authors' code gives networks their time: a thousandth of the clipped process each."""
    rows = SOLVERS["dpmpp"].rows(levels, sampler, None)
    last = levels.noisiest.timestep
    assert last is not None
    stretched = [replace(level, t=level.t * 1000 / (last + 1)) for level in rows.levels]
    return replace(rows, levels=stretched)


def unclipped(levels: NoiseLevels, sampler: SamplerConfig) -> Rows:
    """UniPC that starts at the last timestep of a cosine schedule, without the clip."""
    assert isinstance(levels, DiscreteLevels)
    levels.noisiest = levels.at_timestep(levels.config.steps - 1.0)
    return SOLVERS["unipc"].rows(levels, sampler, None)


def midpoint(levels: NoiseLevels, case: Case) -> Rows:
    """The sampler ``dpm``: a point between both ends in the cube root of the noise level; with churn."""
    builder, passed = RowBuilder(levels), karras(levels, case["steps"])
    amount, low, high = case.get("churn", 0.0), case.get("s_min", 0.0), case.get("s_max", math.inf)
    gamma = min(amount / len(passed), math.sqrt(2) - 1)
    raised = [one.sigma * (1 + gamma * (low <= one.sigma <= high)) for one in passed]
    extra = [
        math.sqrt(max(hat**2 - one.sigma**2, 0.0)) * case.get("s_noise", 1.0)
        for hat, one in zip(raised, passed, strict=True)
    ]
    assert extra[0] == 0
    for k, hat in enumerate(raised):
        ends = k + 1 == len(passed)
        to = 0.0 if ends else passed[k + 1].sigma
        middle = ((hat ** (1 / 3) + to ** (1 / 3)) / 2) ** 3
        q = (middle - hat) / hat
        builder.add(levels.at_sigma(hat), levels.at_sigma(middle), {"x": 1 + q, "x0": -q}, keep={"x": 1.0})
        q = (to - hat) / middle
        noise = 0.0 if ends else extra[k + 1]
        then = None if ends else levels.at_sigma(raised[k + 1])
        builder.add(levels.at_sigma(middle), then, {"saved": 1.0, "x": q, "x0": -q, "noise": noise})
    return builder.rows(init_scale=levels.prior_scale(levels.at_sigma(raised[0])))


def ancestral(levels: NoiseLevels, case: Case) -> Rows:
    """Ancestral steps: down to less noise than the next level has, then up by added noise."""
    builder, passed = RowBuilder(levels), karras(levels, case["steps"])
    for level, to in pairwise([*passed, None]):
        assert level is not None
        S, S_next = level.sigma, 0.0 if to is None else to.sigma
        up2 = S_next**2 * (S**2 - S_next**2) / S**2
        q = (math.sqrt(S_next**2 - up2) - S) / S
        builder.add(level, to, {"x": 1 + q, "x0": -q, "noise": math.sqrt(up2)})
    return builder.rows(init_scale=levels.prior_scale(passed[0]))


def euler_to_minimum(levels: NoiseLevels, case: Case) -> Rows:
    """The sampler ``progdist``: Euler steps to the smallest level; the state there is the image."""
    builder, passed = RowBuilder(levels), karras(levels, case["steps"] + 1)
    for level, to in pairwise(passed):
        q = (to.sigma - level.sigma) / level.sigma
        builder.add(level, None if to is passed[-1] else to, {"x": 1 + q, "x0": -q})
    return builder.rows(init_scale=levels.prior_scale(passed[0]))


def karras(levels: NoiseLevels, count: int) -> list[Level]:
    """Levels of Karras et al.'s grid, from the noisiest."""
    return levels.grid("karras", levels.noisiest, levels.cleanest, count - 1)
