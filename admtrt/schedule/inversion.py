"""DDIM inversion: from an image to the noise that DDIM decodes into it, and back.

With a_next the alpha_bar of the next noisier step (Dhariwal & Nichol 2021, appendix F)::

    x_{t+1} = sqrt(a_next) x_0(x_t) + sqrt(1 - a_next) eps(x_t)

The image counts as the state at step 0. After L rows the state is that at step L, and decoding starts with
the evaluation of step L.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from admtrt.errors import RequestError
from admtrt.schedule.levels import DiscreteLevels
from admtrt.schedule.respaced import respaced, rows_of_process
from admtrt.schedule.rows import in_order
from admtrt.schedule.table import lower, sampling_schedule

if TYPE_CHECKING:
    from admtrt.config import DiffusionConfig
    from admtrt.schedule.edits import Edit
    from admtrt.schedule.sampler import SamplerConfig
    from admtrt.schedule.table import SamplingSchedule


def inversion_schedule(
    process: DiffusionConfig, sampler: SamplerConfig, levels: int | None = None
) -> SamplingSchedule:
    """The schedule from an image up, without guidance.

    Args:
        process: of the networks.
        sampler: of the method ddim with eta 0.
        levels: number of steps to go up; None for all but one, since alpha_bar would be 0 after the last.

    Raises:
        RequestError: if ``levels`` is out of range.
    """
    noise_levels = DiscreteLevels(process)
    config, steps = respaced(noise_levels, sampler)
    most = len(steps) - 1
    count = most if levels is None else levels
    if not 1 <= count <= most:
        raise RequestError(
            f"{count} levels of noise are out of range; steps {sampler.steps!r} have {most} above an image",
            hint=f"Give 1 to {most}; all of them where left out.",
        )
    a, a_next = steps.alpha_bar[:-1], steps.alpha_bar[1:]
    from_eps = np.sqrt((1 - a_next) / (1 - a))
    columns = {
        "prev_from_x": np.append(from_eps, 0.0),
        "prev_from_x0": np.append(np.sqrt(a_next) - from_eps * np.sqrt(a), 0.0),
    }
    down = rows_of_process(config, steps, columns, None)
    up = in_order(down, np.arange(len(down))[::-1][:count])
    return replace(lower(up, noise_levels, config, sampler.unguided), init_signal=1.0, init_scale=0.0)


def decoding_schedule(
    process: DiffusionConfig, sampler: SamplerConfig, levels: int, edit: Edit | None = None
) -> SamplingSchedule:
    """The schedule of a sample that starts at a level of its respaced process.

    Args:
        process: of the networks.
        sampler: of a method that uses a respaced process.
        levels: number of steps that the inversion went up; the schedule has the last ``levels`` + 1
            evaluations.
        edit: as :func:`~admtrt.schedule.table.sampling_schedule`.
    """
    schedule = sampling_schedule(process, sampler, levels + 1, edit)
    return replace(schedule, init_signal=0.0, init_scale=1.0)
