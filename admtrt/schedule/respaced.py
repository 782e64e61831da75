"""Rows of the solvers on a respaced process, DDPM and DDIM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from admtrt.schedule.levels import DiscreteLevels, Level, NoiseLevels
from admtrt.schedule.parameterisation import process_x0_weights
from admtrt.schedule.process import Process, process_from_config
from admtrt.schedule.rows import Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from admtrt.config import DiffusionConfig
    from admtrt.schedule.sampler import SamplerConfig


def respaced(levels: NoiseLevels, sampler: SamplerConfig) -> tuple[DiffusionConfig, Process]:
    """The respaced process of a sampler's steps.

    Raises:
        RequestError: as :func:`~admtrt.schedule.process.retained_timesteps`.
    """
    assert isinstance(levels, DiscreteLevels)  # as these solvers declare
    return levels.config, process_from_config(levels.config, sampler.steps)


def rows_of_process(
    config: DiffusionConfig, process: Process, columns: dict[str, NDArray[np.float64]], start: Level | None
) -> Rows:
    """Make rows from columns in the order of the process, the cleanest step first.

    ``start`` is the level of one of its steps; noisier steps are left out.
    """
    x0_from_x, x0_from_out = process_x0_weights(config.mean_type, process)
    columns = {"x0_from_x": x0_from_x, "x0_from_out": x0_from_out, **columns}
    lambdas = -np.log(process.sigma)
    count = len(process) if start is None else process.timesteps.tolist().index(start.timestep) + 1
    levels = [
        Level(lam, t, float(timestep))
        for lam, t, timestep in zip(
            lambdas.tolist(), process.model_t.tolist(), process.timesteps.tolist(), strict=True
        )
    ]
    return Rows(
        levels[:count][::-1],
        {name: column[:count][::-1] for name, column in columns.items()},
        init_scale=1.0 if start is None else float(np.sqrt(1 - process.alpha_bar[count - 1])),
    )
