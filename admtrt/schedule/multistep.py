"""Steps, orders and rows shared by the multistep solvers."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from admtrt.errors import RequestError
from admtrt.schedule.grid import check_distinct, evaluations, path
from admtrt.schedule.rows import RowBuilder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from admtrt.schedule.levels import Level, NoiseLevels
    from admtrt.schedule.rows import Rows
    from admtrt.schedule.sampler import SamplerConfig

    Weights = Callable[[Sequence[Level], Level, int], Mapping[str, float]]
    """Function of the levels evaluated so far (newest first), the level that the step leads to, and the order
    of the step. Returns the weights of the step, for :meth:`RowBuilder.add`."""
    Step = Callable[
        [Sequence[Level], Level, int, float], tuple[Mapping[str, float], Mapping[str, float] | None, float]
    ]
    """The same for a solver with a corrector. A further argument is the weight of the newest prediction in
    the state that it corrects. Returns the weights of the step, the weights of ``saved``, and the weight of
    the next evaluation's prediction in the state that it will correct."""

_FEW_DPM_SOLVER, _FEW_DIFFUSERS = 10, 15
"""Below these numbers of steps, DPM-Solver's code and diffusers lower the order at the end."""


def steps_of(
    levels: NoiseLevels, sampler: SamplerConfig, start: Level | None
) -> tuple[list[Level | None], Level | None]:
    """The levels of the steps, and the level of an additional evaluation at the end, or None.

    Raises:
        RequestError: as :func:`~admtrt.schedule.grid.path`; or for ``denoise_to_zero`` with steps that
            already end at zero noise.
    """
    if sampler.option("grid") == "respaced":
        return path(levels, sampler, 0, start), None
    if not sampler.option("denoise_to_zero"):
        return path(levels, sampler, evaluations(sampler), start), None
    if sampler.to == "zero":
        raise RequestError(
            "denoise_to_zero is one more evaluation behind an end at the smallest noise level, not at zero",
            hint="Leave out one of the two.",
        )
    passed = path(levels, sampler, evaluations(sampler, least=2) - 1, start)
    return passed, passed[-1]


def orders_of(sampler: SamplerConfig, steps: int, *, to_zero: bool) -> list[int]:
    """The order of each step, limited by the number of predictions so far and, at the end, ``final_order``.

    ``falling`` ends with orders 2, 1 (order 3) or 1 (order 2). ``dpm-solver`` does this below 10 steps;
    ``diffusers`` below 15, and always in a last step to the image; ``full`` never.
    """
    order, rule = sampler.option("order"), sampler.option("final_order")
    falls = {
        "falling": True,
        "dpm-solver": steps < _FEW_DPM_SOLVER,
        "diffusers": steps < _FEW_DIFFUSERS,
        "full": False,
    }[rule]
    rising = [min(order, step + 1) for step in range(steps)]
    if falls:
        rising = [min(one, steps - step) for step, one in enumerate(rising)]
    if rule == "diffusers" and to_zero and rising:
        rising[-1] = 1
    return rising


def multistep_rows(
    levels: NoiseLevels, sampler: SamplerConfig, start: Level | None, weights: Weights
) -> Rows:
    """Rows of a multistep solver, one per step.

    Raises:
        RequestError: as :func:`steps_of`; or for repeated levels.
    """
    return corrected_rows(
        levels, sampler, start, lambda visited, to, order, _: (weights(visited, to, order), None, 0.0)
    )


def corrected_rows(levels: NoiseLevels, sampler: SamplerConfig, start: Level | None, step: Step) -> Rows:
    """Rows of a multistep solver whose evaluations may also correct the state where they are made.

    Raises:
        RequestError: as :func:`steps_of`; or for repeated levels.
    """
    passed, last = steps_of(levels, sampler, start)
    check_distinct(passed, sampler)
    orders = orders_of(sampler, len(passed) - 1, to_zero=passed[-1] is None)
    builder = RowBuilder(levels)
    visited: list[Level] = []
    correction = 0.0
    for (level, to), order in zip(pairwise(passed), orders, strict=True):
        assert level is not None  # only the last may be the image
        visited.insert(0, level)
        if to is None:
            builder.add(level, None, {"x0": 1.0})
            break
        weights, keep, correction = step(visited, to, order, correction)
        builder.add(level, to, weights, keep=keep if len(visited) < len(orders) else None)
    if last is not None:
        builder.add(last, None, {"x0": 1.0})
    first = passed[0]
    assert first is not None
    return builder.rows(init_scale=levels.start_scale(first, start))
