"""Tolerances of a verification: every bound beside its reason."""

from __future__ import annotations

TOLERANCES = {
    "graph": 1e-4,  # another order of float32 sums changes a deep network by 1e-6 to 1e-5
    "small": 1e-5,  # a few products and sums: 1e-6
    "guide": 5e-4,  # a gradient through the clamp of x_0 jumps where a pixel meets it; 1e-5 where none does
    "step": 1e-4,  # one step adds little to the networks' rounding, unless it amplifies it
    "trajectory": 1e-4,  # clipping x_0 pulls both sides to the same images, so drift stays small
    # Upper limit where a process amplifies rounding: there, the thread count alone changes the original
    # implementation by 4e-3.
    "ill_conditioned": 2e-2,
    "image_ill_conditioned": 3.0,  # 2e-2 of 127.5 levels, cut to whole ones
    "image": 1.0,  # truncation to whole levels: the last bit can change a pixel by one level
}
"""``image...`` count levels of uint8; the others are relative, see :func:`.report.sample_errors`."""

AS_FAR_AS_PYTORCH = 2.0
"""Two float32 computations of a network have similar worst-case errors; kernels with another order of sums
may double them."""


def judged_by_float64(stage: str, reach: float) -> float:
    """Tolerance where rounding is amplified: the stage's, or the effect of rounding the networks' outputs.

    Args:
        stage: ``step``, ``trajectory`` or ``image``.
        reach: change of the results, in float64, if the outputs change by :data:`AS_FAR_AS_PYTORCH` times
            PyTorch's rounding.
    """
    ceiling = TOLERANCES["image_ill_conditioned" if stage == "image" else "ill_conditioned"]
    return max(TOLERANCES[stage], min(reach, ceiling))
