"""Draw the timesteps of a batch, and every random number of a step.

All random numbers are pure functions of the seed, the step and a sample's position in the batch of all
processes. A resumed run therefore needs no generator state, and a batch does not depend on its division into
processes and micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

QUARTILES = 4
_NORMAL_QUARTILES = (-0.6744897501960817, 0.0, 0.6744897501960817)
HISTORY = 10
"""Number of losses per timestep that :class:`LossSecondMomentSampler` remembers."""

UNIFORM_PROBABILITY = 0.001
"""Fraction of draws that stay uniform, so that no timestep is starved."""


class Stream(IntEnum):
    """Names of independent random streams of one seed."""

    INITIAL_WEIGHTS = 0
    TIMESTEPS = 1
    NOISE = 2
    DROPOUT = 3
    HELD_OUT_TIMESTEPS = 4
    HELD_OUT_NOISE = 5


def _generator(stream: Stream, *keys: int) -> np.random.Generator:
    return np.random.default_rng((int(stream), *keys))


def torch_seed(stream: Stream, *keys: int) -> int:
    """A seed for ``torch.manual_seed``."""
    return int(_generator(stream, *keys).integers(2**63))


def draw_noise(
    stream: Stream, seed: int, step: int, places: NDArray[np.int64], shape: tuple[int, ...]
) -> Tensor:
    """Standard normal noise, float32 [N, *shape], for samples at N positions of the whole batch."""
    noise = np.empty((len(places), *shape), dtype=np.float32)
    for place, row in zip(places.tolist(), noise, strict=True):
        _generator(stream, seed, step, place).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(noise)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Noise levels and loss weights of a whole batch, every array [N].

    Attributes:
        levels: timesteps or indices (int64), or noise levels S (float32), as the objective needs.
        weights: float32, importance weights that correct for the sampler.
        quartiles: int64, 0 (cleanest) to 3: quartile of the drawn level, for metrics.
    """

    levels: NDArray[np.int64] | NDArray[np.float32]
    weights: NDArray[np.float32]
    quartiles: NDArray[np.int64]


class LevelSampler:
    """Draws the noise levels of a batch."""

    def draw(self, stream: Stream, seed: int, step: int, size: int) -> Drawn:
        """Draw for the samples of a whole batch."""
        raise NotImplementedError

    def held_out(self) -> LevelSampler:
        """The timesteps for held-out images."""
        return self

    def record(self, levels: NDArray[Any], losses: NDArray[np.float32]) -> None:
        """Learn from the unweighted losses [N] of a whole batch."""

    def state(self) -> dict[str, Tensor]:
        """State that :meth:`load` needs to go on."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state` gave."""


class UniformSampler(LevelSampler):
    """Every timestep is equally likely."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def probabilities(self) -> NDArray[np.float64]:
        """Probability of each timestep, float64 [T]."""
        return np.full(self.steps, 1 / self.steps)

    def draw(self, stream: Stream, seed: int, step: int, size: int) -> Drawn:
        """Timesteps, and the weights 1 / (p T)."""
        p = self.probabilities()
        timesteps = _generator(stream, seed, step).choice(self.steps, size=size, p=p)
        weights = (1 / (p[timesteps] * self.steps)).astype(np.float32)
        return Drawn(timesteps, weights, timesteps * QUARTILES // self.steps)

    def held_out(self) -> LevelSampler:
        """All timesteps uniformly."""
        return UniformSampler(self.steps)


class LossSecondMomentSampler(UniformSampler):
    """Draws timesteps in proportion to sqrt(E[L^2]) of their last losses (IDDPM section 3.3).

    Uniform until every timestep has been seen :data:`HISTORY` times.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self._losses = np.zeros((steps, HISTORY))
        self._counts = np.zeros(steps, dtype=np.int64)

    def probabilities(self) -> NDArray[np.float64]:
        """Probability of each timestep, float64 [T]."""
        if (self._counts < HISTORY).any():
            return super().probabilities()
        moment: NDArray[np.float64] = np.sqrt((self._losses**2).mean(axis=1))
        if not moment.any():
            return super().probabilities()
        focused: NDArray[np.float64] = moment / moment.sum()
        return focused * (1 - UNIFORM_PROBABILITY) + UNIFORM_PROBABILITY / self.steps

    def record(self, levels: NDArray[Any], losses: NDArray[np.float32]) -> None:
        """Learn from the unweighted losses [N] of a whole batch; the oldest of a timestep is forgotten."""
        for timestep, loss in zip(levels.tolist(), losses.tolist(), strict=True):
            self._losses[timestep, self._counts[timestep] % HISTORY] = loss
            self._counts[timestep] += 1

    def state(self) -> dict[str, Tensor]:
        """State that :meth:`load` needs to go on."""
        return {
            "losses": torch.from_numpy(self._losses.copy()),
            "counts": torch.from_numpy(self._counts.copy()),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state` gave."""
        self._losses, self._counts = state["losses"].numpy().copy(), state["counts"].numpy().copy()


class StratifiedSampler(UniformSampler):
    """Stratified uniform timesteps: a batch of N has one in each of N equal parts of the process.

    This reduces the variance of gradients (the low-discrepancy sampler of Kingma et al. 2021).
    """

    def draw(self, stream: Stream, seed: int, step: int, size: int) -> Drawn:
        """Draw timesteps in random order, so that no position in the batch has a fixed part."""
        rng = _generator(stream, seed, step)
        timesteps = ((rng.permutation(size) + rng.random(size)) * self.steps / size).astype(np.int64)
        timesteps = np.minimum(timesteps, self.steps - 1)  # the sum may round up to the end
        return Drawn(timesteps, np.ones(size, dtype=np.float32), timesteps * QUARTILES // self.steps)


def make_sampler(name: Literal["uniform", "loss_second_moment", "stratified"], steps: int) -> UniformSampler:
    """The sampler that a configuration names, over ``steps`` timesteps."""
    return {
        "uniform": UniformSampler,
        "loss_second_moment": LossSecondMomentSampler,
        "stratified": StratifiedSampler,
    }[name](steps)


class LogNormalSampler(LevelSampler):
    """Draws log-normal noise levels S (Karras et al. 2022, table 1)."""

    def __init__(self, mean: float, std: float) -> None:
        self._mean, self._std = mean, std

    def draw(self, stream: Stream, seed: int, step: int, size: int) -> Drawn:
        """Noise levels."""
        z = _generator(stream, seed, step).standard_normal(size)
        levels = np.exp(self._mean + self._std * z).astype(np.float32)
        return Drawn(levels, np.ones(size, dtype=np.float32), np.searchsorted(_NORMAL_QUARTILES, z))


class IndexSampler(LevelSampler):
    """Draws indices of noise levels, the noisiest first, uniformly.

    Args:
        count: number of levels at a step.
    """

    def __init__(self, count: Callable[[int], int]) -> None:
        self._count = count

    def draw(self, stream: Stream, seed: int, step: int, size: int) -> Drawn:
        """Indices."""
        count = self._count(step)
        indices = _generator(stream, seed, step).integers(count, size=size)
        quartiles = (count - 1 - indices) * QUARTILES // count
        return Drawn(indices, np.ones(size, dtype=np.float32), quartiles)
