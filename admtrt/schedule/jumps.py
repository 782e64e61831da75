"""Resampling jumps of RePaint (Lugmayr et al. 2022): the order of the evaluated steps."""

from __future__ import annotations

from admtrt.errors import RequestError

MOST_EVALUATIONS = 100_000
"""The most evaluations of a sample with jumps. RePaint's 250 steps with jumps 10:10 need 2,410."""


def evaluated_steps(steps: int, jump: tuple[int, int] | None) -> list[int]:
    """The step of each evaluation from ``steps`` - 1 to 0 with RePaint's jumps (its ``get_schedule_jump``).

    Args:
        steps: number of steps without jumps.
        jump: (L, N): at each multiple of L, the sample jumps L steps back and comes down again, until it has
            reached that step N times; None for no jumps.

    Raises:
        RequestError: if no jump fits, or there would be too many evaluations.
    """
    if jump is None:
        return list(range(steps - 1, -1, -1))
    length, times = jump
    if length >= steps:
        raise RequestError(
            f"jumps of {length} steps do not fit in {steps} evaluations; the original makes none, silently",
            hint=f"Use a length below {steps}, or more steps.",
        )
    left = dict.fromkeys(range(0, steps - length, length), times - 1)
    total = steps + len(left) * (times - 1) * length
    if total > MOST_EVALUATIONS:
        raise RequestError(
            f"jumps {length}:{times} make {total} evaluations of {steps} steps; "
            f"at most {MOST_EVALUATIONS} are possible",
            hint="Use fewer repetitions or fewer steps; RePaint uses 10:10.",
        )
    evaluated: list[int] = []
    step = steps - 1
    while step >= 0:
        if left.get(step, 0):
            left[step] -= 1
            step += length
        evaluated.append(step)
        step -= 1
    return evaluated
