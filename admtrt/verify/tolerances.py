"""What a verification accepts: every bound beside its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from admtrt.config import SamplerConfig
    from admtrt.schedule import Process


@dataclass(frozen=True)
class Tolerance:
    """The largest error that passes, and why it is neither smaller nor larger."""

    bound: float
    reason: str


TOLERANCES = {
    "graph": Tolerance(1e-4, "summing float32 in another order moves a deep network by 1e-6 to 1e-5"),
    "step": Tolerance(
        1e-4,
        "trained networks give 1e-6; a DDPM step of a cosine schedule may exceed it, see docs/numerics.md",
    ),
    "trajectory": Tolerance(1e-4, "clipping x_0 pulls both sides to the same images, so drift stays small"),
    "ill_conditioned": Tolerance(
        2e-2,
        "DDIM turns x_0 into eps and back through 1 / sqrt(alpha_bar), above 1e3 at the noisiest step of "
        "such a schedule; the thread count alone moves PyTorch's own result by 4e-3 there",
    ),
    "image": Tolerance(1, "pixels are cut to whole levels, so the last bit can move one by a level"),
}
"""``image`` counts uint8 levels; the others are relative, see :func:`admtrt.verify.report.sample_errors`."""

_ILL_CONDITIONED = 1e3  # 1 / sqrt(alpha_bar): linear schedules reach 157, a cosine one of 1000 steps 2e4


def sampling_tolerance(stage: str, sampler: SamplerConfig, process: Process) -> float:
    """Bound of the stages ``step`` and ``trajectory`` for a sampler on a process."""
    amplification = 1 / np.sqrt(process.alpha_bar[-1])
    if sampler.method == "ddim" and amplification > _ILL_CONDITIONED:
        stage = "ill_conditioned"
    return TOLERANCES[stage].bound
