"""Guidance: the scale at each evaluation, and the resulting shift of the predicted x_0."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from admtrt.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from admtrt.schedule.sampler import SamplerConfig

    Float64 = NDArray[np.float64]


def guidance_scales(sigma: Float64, sampler: SamplerConfig) -> Float64:
    """The classifier's guidance scale at each noise level S, float64 [R]: 0 outside the sampler's interval.

    It is also 0 where S is infinite: in pure noise a classifier sees nothing.

    Raises:
        RequestError: if no level lies in the interval.
    """
    return scales_in(sigma, sampler.scale, sampler.guidance_interval)


def scales_in(
    sigma: Float64, scale: float, interval: tuple[float, float] | None, *, off: float = 0.0
) -> Float64:
    """A scale at each noise level S, float64 [R]; ``off`` outside the interval and where S is infinite.

    Raises:
        RequestError: if no level lies in the interval.
    """
    if interval is None or scale == off:
        return np.where(np.isfinite(sigma), scale, off)
    low, high = interval
    inside = (low < sigma) & (sigma <= high) & np.isfinite(sigma)
    if not inside.any():
        raise RequestError(
            f"the guidance interval {low:g} to {high:g} holds none of the {len(sigma)} steps, "
            f"whose noise levels are {sigma.min():.4g} to {sigma.max():.4g}",
            hint="Widen the interval, or use scale 0 for samples without guidance.",
        )
    return np.where(inside, scale, off)


def x0_shifts(sigma: Float64, sampler: SamplerConfig) -> Float64:
    """Weight of the classifier's gradient in the predicted x_0 at each noise level S, float64 [R].

    eps shifts by -scale sigma g (Dhariwal & Nichol 2021, Algorithm 2), so x_0 shifts by scale sigma^2 / alpha
    g = scale S^2 alpha g.
    """
    shifts: Float64 = guidance_scales(sigma, sampler) * sigma**2 / np.hypot(1.0, sigma)
    return shifts
