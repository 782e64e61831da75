"""Guided DDIM: Algorithm 2 of Dhariwal & Nichol 2021, with the noise of DDIM eq. 16 for eta > 0.

The guide moves eps, and with it the predicted x_0::

    eps^    = eps(x_0) - scale sqrt(1 - a) g
    x_{t-1} = sqrt(a') x_0(eps^) + sqrt(1 - a' - sigma^2) eps^ + sigma z

with a and a' the alpha_bar of the step and of the one it leads to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from admtrt.schedule.solvers.registry import solver

if TYPE_CHECKING:
    from admtrt.schedule.levels import Level, NoiseLevels
    from admtrt.schedule.rows import Rows
    from admtrt.schedule.sampler import SamplerConfig


@solver(
    "ddim",
    source="Dhariwal & Nichol 2021, Algorithm 2",
    steps="respacing",
    implied_by="ddim",
    default_steps="25",
    options={"eta": 0.0},
)
def ddim(levels: NoiseLevels, sampler: SamplerConfig, start: Level | None) -> Rows:
    """Rows of DDIM, one for each retained timestep."""
    import numpy as np

    from admtrt.schedule.guidance import guidance_scales
    from admtrt.schedule.respaced import respaced, rows_of_process

    config, process = respaced(levels, sampler)
    a, a_prev = process.alpha_bar, process.alpha_bar_prev
    scale = guidance_scales(process.sigma, sampler)
    sigma = sampler.eta * np.sqrt((1 - a_prev) / (1 - a)) * np.sqrt(1 - a / a_prev)
    from_eps = np.sqrt(np.maximum(1 - a_prev - sigma**2, 0.0))
    shift = scale * (1 - a) / np.sqrt(a)
    columns = {
        "prev_from_x": from_eps / np.sqrt(1 - a),
        "prev_from_x0": np.sqrt(a_prev) - from_eps * np.sqrt(a / (1 - a)),
        "x0_shift": shift,
        # Equal to prev_from_x0 * x0_shift but for rounding; the bits of earlier versions are kept.
        "guidance": np.sqrt(a_prev) * shift - scale * from_eps * np.sqrt(1 - a),
        "noise": sigma * (np.arange(len(process)) > 0),
    }
    return rows_of_process(config, process, columns, start)
