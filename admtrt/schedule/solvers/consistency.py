"""Sampling of consistency models (Song et al. 2023, Algorithm 1): a prediction, then fresh noise.

In x~ = x_0 + S eps, from S to S' with S_min the smallest level of the training::

    x~' = m + sqrt(S'^2 - S_min^2) z,    and the last prediction is the image

The levels are indices into Karras et al.'s grid. The last index is the end of the sample and is never
evaluated.
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

_PUBLISHED = {2: (0, 22, 39)}
"""Indices of 40 levels: those of the published two-step samples of ImageNet-64."""
_LEVELS = 40


@solver(
    "consistency",
    source="Song et al. 2023, arXiv 2303.01469, Algorithm 1",
    processes=("edm",),
    options={"levels": None, "levels_of": _LEVELS, "threshold": "static"},
    narrower={"threshold": ("static",)},
    default_steps="2",  # table 1 of the paper
    own_of="consistency",
)
def consistency(levels: NoiseLevels, sampler: SamplerConfig, start: Level | None) -> Rows:
    """Rows of a consistency model's sampler."""
    from admtrt.schedule.grid import from_start
    from admtrt.schedule.rows import RowBuilder

    count, indices = sampler.option("levels_of"), indices_of(sampler)
    if indices[-1] >= count:
        raise RequestError(
            f"level {indices[-1]} is out of range: there are {count}, 0 to {count - 1}",
            hint="Give their number with --levels-of.",
        )
    grid = levels.grid("karras", levels.noisiest, levels.cleanest, count - 1)
    builder = RowBuilder(levels)
    if start is not None:
        kept = from_start([*(grid[index] for index in indices[:-1]), None], sampler, start)
        indices = indices[-len(kept) :]
    for place, (index, following) in enumerate(pairwise(indices)):
        if place == len(indices) - 2:
            builder.add(grid[index], None, {"x0": 1.0})
        else:
            noise = math.sqrt(max(grid[following].sigma ** 2 - levels.cleanest.sigma**2, 0.0))
            builder.add(grid[index], grid[following], {"x0": 1.0, "noise": noise})
    return builder.rows(init_scale=levels.start_scale(grid[indices[0]], start))


def indices_of(sampler: SamplerConfig) -> tuple[int, ...]:
    """A sampler's levels, as indices into the grid.

    Raises:
        RequestError: if their number does not fit the number of evaluations.
    """
    from admtrt.schedule.grid import evaluations

    asked, given = evaluations(sampler), sampler.option("levels")
    if given is not None:
        if asked != len(given) - 1:
            raise RequestError(
                f"{len(given)} levels are {len(given) - 1} evaluations, not {asked}: "
                "the last is where the sample ends",
                hint=f"Ask for --steps {len(given) - 1}.",
            )
        return tuple(given)
    count = sampler.option("levels_of")
    if asked > count - 1:
        raise RequestError(f"{asked} evaluations of {count} levels; expected at most {count - 1}")
    if count == _LEVELS and asked in _PUBLISHED:
        return _PUBLISHED[asked]
    return tuple(round(place * (count - 1) / asked) for place in range(asked + 1))
