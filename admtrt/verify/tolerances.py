"""What a verification accepts: every bound beside its reason."""

from __future__ import annotations

TOLERANCES = {
    "graph": 1e-4,  # summing float32 in another order moves a deep network by 1e-6 to 1e-5
    "step": 1e-4,  # one step moves the networks' rounding little further, unless it amplifies
    "trajectory": 1e-4,  # clipping x_0 pulls both sides to the same images, so drift stays small
    # Where a process amplifies, the ceiling of what rounding may allow; the thread count alone moves the
    # original implementation by 4e-3 there.
    "ill_conditioned": 2e-2,
    "image": 1.0,  # pixels are cut to whole levels, so the last bit can move one by a level
}
"""``image`` counts uint8 levels; the others are relative, see :func:`admtrt.verify.report.sample_errors`."""

AS_FAR_AS_PYTORCH = 2.0
"""Two float32 computations of a network lie about as far from it, each where it is furthest; kernels that add
in another order may double it."""


def judged_by_float64(stage: str, reach: float) -> float:
    """Bound where rounding is amplified: the stage's, or what rounding of the networks' outputs makes.

    Args:
        stage: ``step`` or ``trajectory``.
        reach: how far outputs that are moved by :data:`AS_FAR_AS_PYTORCH` times PyTorch's own rounding move
            the results, in float64.
    """
    return max(TOLERANCES[stage], min(reach, TOLERANCES["ill_conditioned"]))
