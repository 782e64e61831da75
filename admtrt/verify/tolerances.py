"""What a verification accepts: every bound beside its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from admtrt.schedule.process import Process


TOLERANCES = {
    "graph": 1e-4,  # summing float32 in another order moves a deep network by 1e-6 to 1e-5
    "step": 1e-4,  # one step moves the networks' rounding little further, unless it amplifies
    "trajectory": 1e-4,  # clipping x_0 pulls both sides to the same images, so drift stays small
    # Where a process amplifies, the ceiling of what PyTorch's own distance from float64 may allow; the thread
    # count alone moves the original implementation by 4e-3 there.
    "ill_conditioned": 2e-2,
    "image": 1.0,  # pixels are cut to whole levels, so the last bit can move one by a level
}
"""``image`` counts uint8 levels; the others are relative, see :func:`admtrt.verify.report.sample_errors`."""

_AMPLIFIES = 1e3
"""1 / sqrt(alpha_bar) at the noisiest step, the factor from eps to x_0: linear schedules reach 157, a cosine
one of 1000 steps 2e4."""

_AS_FAR_AS_PYTORCH = 4.0
"""Two float32 computations of one value lie about as far from it; samples differ in which few pixels of x_0
the clipping leaves to carry the error, so the larger may be a few times the smaller."""


def amplifies(process: Process) -> bool:
    """Whether a process magnifies rounding so much that float32 results are judged against float64."""
    return bool(1 / np.sqrt(process.alpha_bar[-1]) > _AMPLIFIES)


def judged_by_float64(stage: str, own_error: float) -> float:
    """Bound where the process amplifies: the stage's, or a few times PyTorch's own distance from float64.

    Args:
        stage: ``step`` or ``trajectory``.
        own_error: the largest error of PyTorch in float32 against the same networks in float64.
    """
    allowed = min(_AS_FAR_AS_PYTORCH * own_error, TOLERANCES["ill_conditioned"])
    return max(TOLERANCES[stage], allowed)
