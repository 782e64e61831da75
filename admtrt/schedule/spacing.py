"""Diffusers' spacings of a process's timesteps, for DDPM and DDIM: leading, linspace and trailing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from admtrt.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_KINDS = ("leading", "linspace", "trailing")
_FORM = re.compile(r"(leading|linspace|trailing):([0-9]{1,9})(?:\+([0-9]{1,9}))?")


def is_spacing(respacing: str) -> bool:
    """True if a respacing names a spacing, which only DDPM and DDIM support."""
    return respacing.strip().partition(":")[0] in _KINDS


def spaced_timesteps(steps: int, respacing: str) -> tuple[int, ...]:
    """Timesteps of a process of T steps that a spacing keeps, ascending.

    Args:
        steps: T.
        respacing: ``"leading:N"``, i floor(T / N); ``"leading:N+OFFSET"``, the same plus OFFSET;
            ``"linspace:N"``, evenly from 0 to T - 1; ``"trailing:N"``, T - i T / N - 1. Halves round to even.

    Raises:
        RequestError: if the text is none of these, or the process has no such timesteps.
    """
    found = _FORM.fullmatch(respacing.strip())
    if found is None or int(found[2]) < 1 or (found[3] is not None and found[1] != "leading"):
        raise RequestError(
            f"steps {respacing[:60]!r} is no spacing of timesteps",
            hint="Write e.g. 'leading:50', 'leading:50+1', 'linspace:50' or 'trailing:50'.",
        )
    kind, count, offset = found[1], int(found[2]), int(found[3] or 0)
    timesteps: NDArray[np.float64]
    if count > steps:
        raise RequestError(f"steps {respacing!r}: {steps} timesteps cannot give {count}")
    if kind == "leading":
        timesteps = np.arange(count, dtype=np.float64) * (steps // count) + offset
    elif kind == "linspace":
        timesteps = np.linspace(0, steps - 1, count).round()
    else:
        # The last one is above 0, so only the first N can be meant.
        timesteps = np.arange(steps, 0, -steps / count)[:count].round()[::-1] - 1
    if timesteps[-1] >= steps:
        raise RequestError(
            f"steps {respacing!r} reaches timestep {int(timesteps[-1])} of {steps}, 0 to {steps - 1}",
            hint=f"Use an offset of {steps - 1 - int(timesteps[-1] - offset)} or less, or fewer steps.",
        )
    return tuple(int(timestep) for timestep in timesteps)
