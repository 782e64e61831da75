"""Tables of the graph ``update``, ordered by the step of their process."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from admtrt.config import DiffusionConfig
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import UPDATE, sampling_schedule


def step_coefficients(config: DiffusionConfig, sampler: SamplerConfig) -> NDArray[np.float32]:
    """Rows of DDPM or DDIM, float32 [S, len(UPDATE)], row i for step i of the respaced process."""
    schedule = sampling_schedule(config, sampler)
    assert not schedule.full
    return schedule.coefficients[::-1, : len(UPDATE)]
