"""Continuous noise levels of a process: signal-to-noise ratios, the networks' t, and grids.

Notation: ``alpha`` and ``sigma`` are the weights of x_0 and of the noise in x_t, lambda = log(alpha / sigma)
is half the log signal-to-noise ratio, and ``S = sigma / alpha = exp(-lambda)`` the noise level of Karras et
al. 2022, in which x~ = x_0 + S eps. A network's input is ``c_in(S) x~``; with c_in = alpha this is the x_t of
a variance-preserving process.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from admtrt.config import EdmConfig
from admtrt.errors import RequestError
from admtrt.schedule.process import betas

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from admtrt.config import DiffusionConfig
    from admtrt.schedule.options import Grid

_CLIPPED_LAMBDA = -5.1
"""Fast solvers start no noisier than this (DPM-Solver's clip): cosine schedules end at 1 / alpha = 2e4."""
_MAX_SIGMA, _MIN_SIGMA, _RHO = 80.0, 0.002, 7.0
"""The ends and the exponent of Karras et al.'s grid (their table 1)."""


@dataclass(frozen=True)
class Level:
    """A noise level.

    Attributes:
        lam: lambda, half the log signal-to-noise ratio.
        t: the networks' input ``t``.
        timestep: timestep of the discrete process, possibly fractional; None if the process has none.
    """

    lam: float
    t: float
    timestep: float | None = None

    @property
    def sigma(self) -> float:
        """S, the noise level of x_0 + S eps."""
        return math.exp(-self.lam)


class NoiseLevels(ABC):
    """The noise levels of a process.

    Attributes:
        kind: of the process.
        noisiest: the level at which fast solvers start.
        cleanest: the smallest level used in training.
        grids: the supported grids; the first is the default.
    """

    kind: str
    noisiest: Level
    cleanest: Level
    grids: tuple[Grid, ...]

    @abstractmethod
    def c_in(self, level: Level | None) -> float:
        """Scale of the networks' input at a level; 1 for None, the image itself."""

    @abstractmethod
    def at_sigma(self, sigma: float) -> Level:
        """The level with this S."""

    def ends(self, kind: Grid) -> tuple[Level, Level]:  # noqa: ARG002 - the same for most grids
        """The noisiest and the cleanest level of a grid."""
        return self.noisiest, self.cleanest

    @abstractmethod
    def prior_scale(self, level: Level) -> float:
        """Standard deviation of the initial noise of a sample that starts at a level."""

    def start_scale(self, level: Level, start: Level | None) -> float:
        """Weight of the initial noise in the first state, without or with an image to start from."""
        return self.prior_scale(level) if start is None else self.c_in(level) * level.sigma

    def rounded(self, level: Level) -> Level:
        """The nearest level that the networks were trained on; the level itself in a continuous process."""
        return level

    def grid(self, kind: Grid, start: Level, end: Level, steps: int) -> list[Level]:
        """``steps`` + 1 levels from ``start`` to ``end``, both exact.

        Raises:
            RequestError: if the process has no such grid.
        """
        if kind not in self.grids:
            raise RequestError(
                f"grid '{kind}' is none of this process", hint=f"It has: {', '.join(self.grids)}."
            )
        inner = self._inner(kind, start, end, steps) if steps > 1 else []
        return [start, *inner, end]

    def _inner(self, kind: Grid, start: Level, end: Level, steps: int) -> list[Level]:
        if kind == "karras":
            low, high = end.sigma ** (1 / _RHO), start.sigma ** (1 / _RHO)
            return [self.at_sigma((high + k / steps * (low - high)) ** _RHO) for k in range(1, steps)]
        return [self._at_lambda(lam) for lam in np.linspace(start.lam, end.lam, steps + 1)[1:-1].tolist()]

    @abstractmethod
    def _at_lambda(self, lam: float) -> Level: ...


class DiscreteLevels(NoiseLevels):
    """A discrete process with log alpha interpolated linearly between timesteps, as in DPM-Solver.

    Args:
        config: of the process.
    """

    kind = "discrete"
    grids: tuple[Grid, ...] = ("time_uniform", "logsnr", "quadratic", "karras", "trained", "respaced")

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        with np.errstate(divide="ignore"):  # log(0) if the last step has no signal
            self._log_alpha = 0.5 * np.cumsum(np.log1p(-betas(config)))
        self._timesteps = np.arange(config.steps, dtype=np.float64)
        self._lambdas = _lambda_of(self._log_alpha)
        self._t_factor = config.time_factor
        above = np.flatnonzero(self._lambdas >= _CLIPPED_LAMBDA)
        self.noisiest = self.at_timestep(float(above[-1]) if len(above) else 0.0)
        self.cleanest = self.at_timestep(0.0)

    def at_timestep(self, timestep: float) -> Level:
        """The level of a timestep, which may be fractional."""
        log_alpha = np.interp(timestep, self._timesteps, self._log_alpha)
        return Level(float(_lambda_of(log_alpha)), timestep * self._t_factor, timestep)

    def at_sigma(self, sigma: float) -> Level:
        """See :class:`NoiseLevels`."""
        return self._at_lambda(-math.log(sigma))

    def c_in(self, level: Level | None) -> float:
        """See :class:`NoiseLevels`."""
        return 1.0 if level is None else 1.0 / math.sqrt(1.0 + math.exp(-2.0 * level.lam))

    def prior_scale(self, level: Level) -> float:  # noqa: ARG002 - x_T is standard normal by definition
        """See :class:`NoiseLevels`."""
        return 1.0

    def rounded(self, level: Level) -> Level:
        """See :class:`NoiseLevels`."""
        nearest = np.abs(np.exp(-self._lambdas) - level.sigma).argmin()
        return self.at_timestep(float(nearest))

    def ends(self, kind: Grid) -> tuple[Level, Level]:
        """See :class:`NoiseLevels`."""
        if kind != "karras":
            return self.noisiest, self.cleanest
        return (
            self.at_sigma(min(_MAX_SIGMA, math.exp(-self._lambdas[-1]))),
            self.at_sigma(max(_MIN_SIGMA, self.cleanest.sigma)),
        )

    def _inner(self, kind: Grid, start: Level, end: Level, steps: int) -> list[Level]:
        if kind in ("logsnr", "karras"):
            return super()._inner(kind, start, end, steps)
        assert start.timestep is not None
        assert end.timestep is not None
        if kind == "quadratic":  # in timestep + 1 = continuous time * number of timesteps
            ends = math.sqrt(start.timestep + 1), math.sqrt(end.timestep + 1)
            timesteps = np.linspace(*ends, steps + 1) ** 2 - 1
        else:
            timesteps = np.linspace(start.timestep, end.timestep, steps + 1)
        if kind == "trained":
            timesteps = np.linspace(end.timestep, start.timestep, steps + 1).round()[::-1]  # half to even
        return [self.at_timestep(timestep) for timestep in timesteps[1:-1].tolist()]

    def _at_lambda(self, lam: float) -> Level:
        log_alpha = -0.5 * np.logaddexp(0.0, -2.0 * lam)
        timestep = float(np.interp(-log_alpha, -self._log_alpha, self._timesteps))
        return Level(lam, timestep * self._t_factor, timestep)


class EdmLevels(NoiseLevels):
    """A continuous process with EDM's preconditioning, as openai/consistency_models trained it.

    Args:
        config: of the process.
    """

    kind = "edm"
    grids: tuple[Grid, ...] = ("karras", "logsnr")

    def __init__(self, config: EdmConfig) -> None:
        self.config = config
        self.noisiest = self.at_sigma(config.sigma_max)
        self.cleanest = self.at_sigma(config.sigma_min)

    def at_sigma(self, sigma: float) -> Level:
        """See :class:`NoiseLevels`."""
        return Level(-math.log(sigma), 250.0 * math.log(sigma))

    def c_in(self, level: Level | None) -> float:
        """See :class:`NoiseLevels`."""
        return 1.0 if level is None else 1.0 / math.hypot(level.sigma, self.config.sigma_data)

    def prior_scale(self, level: Level) -> float:
        """See :class:`NoiseLevels`."""
        return self.c_in(level) * level.sigma

    def _at_lambda(self, lam: float) -> Level:
        return Level(lam, -250.0 * lam)


def levels_of(config: DiffusionConfig | EdmConfig) -> NoiseLevels:
    """The noise levels of a process."""
    return EdmLevels(config) if isinstance(config, EdmConfig) else DiscreteLevels(config)


def _lambda_of(log_alpha: NDArray[np.float64] | np.float64) -> NDArray[np.float64]:
    return np.asarray(log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha)))
