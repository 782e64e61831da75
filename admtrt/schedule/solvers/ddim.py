"""Guided DDIM: Algorithm 2 of Dhariwal & Nichol 2021, with the noise of DDIM eq. 16 for eta > 0.

The guide shifts eps, and with it the predicted x_0::

    eps^    = eps(x_0) - scale sqrt(1 - a) g
    x_{t-1} = sqrt(a') x_0(eps^) + sqrt(1 - a' - sigma^2) eps^ + sigma z

with a and a' the alpha_bar of the step and of the next one. With ``direction`` ``network``, diffusers'
default, the step uses the network's own eps instead of the eps of the clipped x_0; the two differ where x_0
is clipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from admtrt.schedule.solvers.registry import solver

if TYPE_CHECKING:
    from admtrt.config import DiffusionConfig
    from admtrt.schedule.levels import Level, NoiseLevels
    from admtrt.schedule.process import Process
    from admtrt.schedule.rows import Rows
    from admtrt.schedule.sampler import SamplerConfig


@solver(
    "ddim",
    source="Dhariwal & Nichol 2021, Algorithm 2",
    steps="respacing",
    implied_by="ddim",
    default_steps="25",
    options={"eta": 0.0, "direction": "clipped", "threshold": "static", "threshold_max": None},
)
def ddim(levels: NoiseLevels, sampler: SamplerConfig, start: Level | None) -> Rows:
    """Rows of DDIM, one for each retained timestep."""
    from admtrt.schedule.respaced import respaced

    return ddim_rows(*respaced(levels, sampler), sampler, start)


def ddim_rows(
    config: DiffusionConfig, process: Process, sampler: SamplerConfig, start: Level | None = None
) -> Rows:
    """Rows of DDIM on a process whose steps lead from each ``alpha_bar`` to its ``alpha_bar_prev``."""
    import numpy as np

    from admtrt.schedule.guidance import guidance_scales
    from admtrt.schedule.parameterisation import process_x0_weights
    from admtrt.schedule.respaced import rows_of_process

    a, a_prev = process.alpha_bar, process.alpha_bar_prev
    scale = guidance_scales(process.sigma, sampler)
    sigma = sampler.eta * np.sqrt((1 - a_prev) / (1 - a)) * np.sqrt(1 - a / a_prev)
    from_eps = np.sqrt(np.maximum(1 - a_prev - sigma**2, 0.0))
    # Without any signal (a = 0) there is no guidance.
    shift = np.divide(scale * (1 - a), np.sqrt(a), out=np.zeros(len(a)), where=scale != 0)
    columns = {
        "prev_from_x": from_eps / np.sqrt(1 - a),
        "prev_from_x0": np.sqrt(a_prev) - from_eps * np.sqrt(a / (1 - a)),
        "x0_shift": shift,
        # Equals prev_from_x0 * x0_shift up to rounding; this form keeps the bits of earlier versions.
        "guidance": np.sqrt(a_prev) * shift - scale * from_eps * np.sqrt(1 - a),
        "noise": sigma,
    }
    if sampler.option("direction") == "network":
        # eps is (x - sqrt(a) y) / sqrt(1 - a), where y, the unclipped x_0, is linear in x and the output.
        y_from_x, y_from_out = process_x0_weights(config.mean_type, process)
        columns["prev_from_x0"] = np.sqrt(a_prev)
        columns["prev_from_x"] = from_eps * (1 - np.sqrt(a) * y_from_x) / np.sqrt(1 - a)
        columns["prev_from_out"] = -from_eps * np.sqrt(a) * y_from_out / np.sqrt(1 - a)
    return rows_of_process(config, process, columns, start)
