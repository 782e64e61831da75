"""Tolerances of a verification: every bound beside its reason."""

from __future__ import annotations

TOLERANCES = {
    "graph": 1e-4,  # summing float32 in another order moves a deep network by 1e-6 to 1e-5
    "small": 1e-5,  # of a few products and sums: 1e-6
    "guide": 5e-4,  # a gradient through the clamp of x_0 jumps where a pixel meets it; 1e-5 where none does
    "step": 1e-4,  # one step moves the networks' rounding little further, unless it amplifies
    "trajectory": 1e-4,  # clipping x_0 pulls both sides to the same images, so drift stays small
    # Where a process amplifies, the ceiling of what rounding may allow; the thread count alone moves the
    # original implementation by 4e-3 there.
    "ill_conditioned": 2e-2,
    "image_ill_conditioned": 3.0,  # 2e-2 of 127.5 levels, cut to whole ones
    "image": 1.0,  # pixels are cut to whole levels, so the last bit can move one by a level
}
"""``image...`` count levels of uint8; the others are relative, see :func:`.report.sample_errors`."""

AS_FAR_AS_PYTORCH = 2.0
"""Two float32 computations of a network lie about as far from it, each where it is furthest; kernels that add
in another order may double it."""


def judged_by_float64(stage: str, reach: float) -> float:
    """Bound where rounding is amplified: the stage's, or what rounding of the networks' outputs makes.

    Args:
        stage: ``step``, ``trajectory`` or ``image``.
        reach: how far outputs that are moved by :data:`AS_FAR_AS_PYTORCH` times PyTorch's own rounding move
            the results, in float64.
    """
    ceiling = TOLERANCES["image_ill_conditioned" if stage == "image" else "ill_conditioned"]
    return max(TOLERANCES[stage], min(reach, ceiling))
