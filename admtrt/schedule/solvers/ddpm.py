"""Guided DDPM: Algorithm 1 of Dhariwal & Nichol 2021, ancestral sampling of Ho et al. 2020.

The mean of p(x_{t-1} | x_t) shifts by the guide's gradient g times the variance w::

    x_{t-1} = posterior_mean_x0 x_0 + posterior_mean_xt x_t + scale w g + sqrt(w) z

where w is a function of the network's variance channels if it has any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from admtrt.schedule.solvers.registry import solver

if TYPE_CHECKING:
    from admtrt.schedule.levels import Level, NoiseLevels
    from admtrt.schedule.rows import Rows
    from admtrt.schedule.sampler import SamplerConfig


@solver(
    "ddpm",
    source="Dhariwal & Nichol 2021, Algorithm 1",
    steps="respacing",
    default_steps="250",
    implied_by="",
    options={"threshold": "static", "threshold_max": None},
)
def ddpm(levels: NoiseLevels, sampler: SamplerConfig, start: Level | None) -> Rows:
    """Rows of DDPM, one for each retained timestep."""
    import numpy as np

    from admtrt.schedule.guidance import guidance_scales
    from admtrt.schedule.parameterisation import log_variance_weights
    from admtrt.schedule.respaced import respaced, rows_of_process

    config, process = respaced(levels, sampler)
    not_last = (np.arange(len(process)) > 0).astype(np.float64)
    columns = {"noise": not_last}
    if config.mean_type == "previous_x":
        columns["prev_from_out"] = np.ones(len(process))
    else:
        columns["prev_from_x0"] = process.posterior_mean_x0
        columns["prev_from_x"] = process.posterior_mean_xt
    columns["log_weight"], columns["log_weight_from_v"] = log_variance_weights(config.variance_type, process)
    # The true posterior variance of the last step is 0, unlike the exponential of its clipped log.
    guided = not_last if config.variance_type == "fixed_small" else np.ones(len(process))
    columns["guidance"] = guidance_scales(process.sigma, sampler) * guided
    return rows_of_process(config, process, columns, start)
