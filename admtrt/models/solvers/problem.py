"""Inputs of every solver's paper form: noise levels in the papers' notation, and x_theta(x_t, t)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from admtrt.config import EdmConfig
from admtrt.contract import quantile_of
from admtrt.models.diffusion import bounded
from admtrt.schedule.levels import levels_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from numpy.typing import NDArray

    from admtrt.config import DiffusionConfig
    from admtrt.schedule.levels import Level
    from admtrt.schedule.sampler import SamplerConfig


class Networks(Protocol):
    """The networks with their conditions bound."""

    def __call__(self, x: Tensor, t: float, /) -> tuple[Tensor, Tensor | None]:
        """The UNet's output and d log p(y | x) / dx; None without guidance.

        ``x`` is [N, C, H, W] in the dtype of the computation, ``t`` the networks' input before rounding to
        float32.
        """
        ...


class State(NamedTuple):
    """A sample between two steps.

    Attributes:
        x: the networks' next input, [N, C, H, W]; in the last state, the image.
        x_0: the last prediction of x_0, guided and clipped; None before the first.
    """

    x: Tensor
    x_0: Tensor | None


@dataclass
class Problem:
    """A batch of samples to draw, which differ only in noise and conditions.

    Attributes:
        process, sampler: as for :func:`admtrt.schedule.table.sampling_schedule`.
        networks: see :class:`Networks`.
        x_T: standard normal, [N, C, H, W]; its dtype and device are those of the computation.
        noise: standard normal noise, by the number of evaluations still to come.
        start: where samples start from ``image``, [N, C, H, W] in [-1, 1]; None starts from pure noise.
        quantile: quantile of dynamic thresholds; None for the default.
    """

    process: DiffusionConfig | EdmConfig
    sampler: SamplerConfig
    networks: Networks
    x_T: Tensor  # noqa: N815 - the papers' name
    noise: Callable[[int], Tensor]
    start: Level | None = None
    image: Tensor | None = None
    quantile: float | None = None

    def __post_init__(self) -> None:
        self.levels = levels_of(self.process)
        self._x_0: Tensor | None = None

    def alpha(self, level: Level | None) -> float:
        """Weight of x_0 in x_t; 1 in EDM's process."""
        if level is None or isinstance(self.process, EdmConfig):
            return 1.0
        return math.sqrt(1 / (1 + math.exp(-2 * level.lam)))

    def sigma(self, level: Level | None) -> float:
        """Weight of the noise in x_t."""
        if level is None:
            return 0.0
        if isinstance(self.process, EdmConfig):
            return level.sigma
        return math.sqrt(1 / (1 + math.exp(2 * level.lam)))

    def first(self, level: Level) -> Tensor:
        """x_t at the first level: q(x_t | image), or the prior."""
        if self.image is not None:
            return self.alpha(level) * self.image + self.sigma(level) * self.x_T
        return self.sigma(level) * self.x_T if isinstance(self.process, EdmConfig) else self.x_T

    def scaled(self, x_t: Tensor, level: Level | None) -> Tensor:
        """The networks' input for x_t: c_in x_t in EDM's process."""
        if level is None or not isinstance(self.process, EdmConfig):
            return x_t
        return x_t / math.hypot(level.sigma, self.process.sigma_data)

    def ask(self, x: Tensor, t: float) -> Generator[State, None, tuple[Tensor, Tensor | None]]:
        """Evaluate the networks, after yielding their input as a state."""
        yield State(x, self._x_0)
        return self.networks(x, t)

    def predict(self, x_t: Tensor, level: Level) -> Generator[State, None, Tensor]:
        """x_theta(x_t, t): the prediction of x_0, guided and clipped."""
        alpha, sigma = self.alpha(level), self.sigma(level)
        out, gradient = yield from self.ask(self.scaled(x_t, level), level.t)
        x_0 = self._x_0_of(out[:, : x_t.shape[1]], x_t, level)
        guide_first = self.sampler.option("threshold_order") == "after_guide"
        if not guide_first:
            x_0 = self.bounded(x_0)
        if gradient is not None:
            eps = (x_t - alpha * x_0) / sigma
            eps = eps - float(guidance_scale(level.sigma, self.sampler)) * sigma * gradient  # Algorithm 2
            x_0 = (x_t - sigma * eps) / alpha
        if guide_first:
            x_0 = self.bounded(x_0)
        self._x_0 = x_0
        return x_0

    def _x_0_of(self, value: Tensor, x_t: Tensor, level: Level) -> Tensor:
        """The prediction of x_0 from a network's output."""
        process, sigma = self.process, self.sigma(level)
        if isinstance(process, EdmConfig):  # D = c_skip x + c_out F, eq. 7 of Karras et al. 2022
            data = process.sigma_data
            above = sigma - process.sigma_min if process.boundary else sigma
            return data**2 / (above**2 + data**2) * x_t + above * data / math.hypot(sigma, data) * value
        if process.mean_type == "eps":
            return (x_t - sigma * value) / self.alpha(level)
        if process.mean_type == "v":
            return self.alpha(level) * x_t - sigma * value
        assert process.mean_type == "x_0"  # x_{t-1} depends on the steps, and only ddpm and ddim support it
        return value

    def bounded(self, x_0: Tensor) -> Tensor:
        """See :func:`~admtrt.models.diffusion.bounded`."""
        return bounded(x_0, self.sampler, quantile_of(x_0[0].numel(), self.quantile))

    def end(self, x_t: Tensor, level: Level | None) -> State:
        """The last state: the image, or x_t at the final level."""
        return State(self.scaled(x_t, level), self._x_0)

    def keep(self, x_0: Tensor) -> None:
        """Store a prediction made elsewhere, for the next state."""
        self._x_0 = x_0


def guidance_scale(S: float | NDArray[np.float64], sampler: SamplerConfig) -> NDArray[np.float64]:
    """The guidance scale at noise levels S = sigma / alpha: 0 outside (low, high], and in pure noise."""
    low, high = sampler.guidance_interval or (-np.inf, np.inf)
    levels = np.asarray(S)
    return np.where((low < levels) & (levels <= high) & np.isfinite(levels), sampler.scale, 0.0)
