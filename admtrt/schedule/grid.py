"""Grids: the noise levels of a sampler's evaluations."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from admtrt.errors import RequestError
from admtrt.schedule.process import retained_timesteps
from admtrt.schedule.spacing import is_spacing

if TYPE_CHECKING:
    from admtrt.schedule.levels import Level, NoiseLevels
    from admtrt.schedule.options import Grid
    from admtrt.schedule.sampler import SamplerConfig

_SAME = 1e-9
"""Relative difference below which two noise levels count as equal."""


def grid_of(levels: NoiseLevels, sampler: SamplerConfig) -> Grid:
    """The grid that a sampler chooses, or the default of its process.

    Raises:
        RequestError: if the process has no such grid.
    """
    chosen: Grid | None = sampler.option("grid")
    if chosen is None:
        return levels.grids[0]
    if chosen not in levels.grids:
        raise RequestError(
            f"grid '{chosen}' needs the timesteps of a discrete process",
            hint=f"This one has the grids {', '.join(levels.grids)}.",
        )
    return chosen


def evaluations(sampler: SamplerConfig, *, least: int = 1) -> int:
    """The number of network evaluations that a sampler chooses.

    Raises:
        RequestError: if the steps are not a whole number, or too few.
    """
    text = sampler.steps.strip()
    if not (text.isascii() and text.isdigit()) or len(text) > 6 or int(text) < least:
        raise RequestError(
            f"steps {sampler.steps!r}: {sampler.method} takes a number of network evaluations, "
            f"{least} or more",
            hint=f"Write e.g. --method {sampler.method} --steps 10.",
        )
    return int(text)


def path(levels: NoiseLevels, sampler: SamplerConfig, count: int, start: Level | None) -> list[Level | None]:
    """The levels of ``count`` evaluations and the level after the last step; None is the image itself.

    With ``start``, only the levels that are no noisier.

    Raises:
        RequestError: if the grid does not have that many levels, or as :func:`from_start`.
    """
    kind = grid_of(levels, sampler)
    to_zero = ends_at_zero(sampler)
    passed: list[Level | None]
    if kind == "respaced":
        passed = _respaced(levels, sampler)
        if not to_zero:
            raise RequestError(
                "grid 'respaced' evaluates every retained timestep, so it ends at zero",
                hint="Leave out --to, or choose another grid.",
            )
    elif kind == "karras" and to_zero:
        first, last = levels.ends(kind)
        passed = [*(levels.grid(kind, first, last, count - 1) if count > 1 else [first]), None]
    else:
        passed = list(levels.grid(kind, *levels.ends(kind), count))
        if to_zero:
            passed[-1] = None
    if sampler.option("sigma") == "rounded":
        passed = [None if level is None else levels.rounded(level) for level in passed]
    return passed if start is None else from_start(passed, sampler, start)


def from_start(passed: list[Level | None], sampler: SamplerConfig, start: Level) -> list[Level | None]:
    """The levels that are no noisier than ``start``.

    Raises:
        RequestError: if no step is left.
    """
    left = [level for level in passed if level is None or level.lam >= start.lam - _SAME]
    if len(left) < 2 and not sampler.option("denoise_to_zero"):
        raise RequestError(
            f"no step of {sampler.method} is left from the noise level {start.sigma:.4g} on",
            hint="Start at more evaluations before the end, or take more steps.",
        )
    return left


def ends_at_zero(sampler: SamplerConfig) -> bool:
    """True if the last step leads to the image itself, not to the level of a last evaluation."""
    return sampler.option("to") == "zero" and not sampler.option("denoise_to_zero")


def check_distinct(passed: list[Level | None], sampler: SamplerConfig) -> None:
    """Refuse repeated levels: a multistep solver would divide by zero.

    Raises:
        RequestError: naming the number of levels.
    """
    again = sum(times - 1 for times in Counter(level.lam for level in passed if level is not None).values())
    if again:
        raise RequestError(
            f"{again} of the {len(passed) - 1} noise levels repeat, and {sampler.method} cannot step "
            "between equal ones",
            hint="Use fewer steps, another grid, or levels between those of the training.",
        )


def _respaced(levels: NoiseLevels, sampler: SamplerConfig) -> list[Level | None]:
    from admtrt.schedule.levels import DiscreteLevels

    assert isinstance(levels, DiscreteLevels)  # the only kind that has this grid
    if is_spacing(sampler.steps):
        raise RequestError(
            f"steps {sampler.steps!r} are of ddpm and ddim, not of {sampler.method}",
            hint="Write e.g. 'ddim25', or give a number of evaluations and another grid.",
        )
    retained = retained_timesteps(levels.config.steps, sampler.steps)
    if levels.config.zero_terminal_snr and retained[-1] == levels.config.steps - 1:
        raise RequestError(
            f"grid 'respaced' begins where no signal is left, and {sampler.method} cannot step from there",
            hint="Use another grid, ddpm or ddim.",
        )
    return [*(levels.at_timestep(float(timestep)) for timestep in reversed(retained)), None]
