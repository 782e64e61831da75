"""Which timesteps a batch is trained at, and every random number of a step.

Everything drawn here is a pure function of the seed, the step and the place of a sample in the batch of all
processes together. A resumed run therefore needs no generator's state, and a batch is the same however it is
divided among processes and micro-batches.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

HISTORY = 10
"""Losses remembered for each timestep by :class:`LossSecondMomentSampler`."""

UNIFORM_PROBABILITY = 0.001
"""Share of the draws that stays uniform, so that no timestep is forgotten."""


class Stream(IntEnum):
    """Independent streams of random numbers of one seed."""

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
    """Standard normal noise, float32 [N, *shape], for the samples at N places of the whole batch."""
    noise = np.empty((len(places), *shape), dtype=np.float32)
    for place, row in zip(places.tolist(), noise, strict=True):
        _generator(stream, seed, step, place).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(noise)


class UniformSampler:
    """Every timestep is equally likely."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def probabilities(self) -> NDArray[np.float64]:
        """Probability of each timestep, float64 [T]."""
        return np.full(self.steps, 1 / self.steps)

    def record(self, timesteps: NDArray[np.int64], losses: NDArray[np.float32]) -> None:
        """Learn from the unweighted losses [N] of a whole batch."""

    def state(self) -> dict[str, Tensor]:
        """What :meth:`load` needs to go on."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state` gave."""


class LossSecondMomentSampler(UniformSampler):
    """Timesteps in proportion to sqrt(E[L^2]) over their last losses (IDDPM section 3.3).

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

    def record(self, timesteps: NDArray[np.int64], losses: NDArray[np.float32]) -> None:
        """Learn from the unweighted losses [N] of a whole batch; the oldest of a timestep is forgotten."""
        for timestep, loss in zip(timesteps.tolist(), losses.tolist(), strict=True):
            self._losses[timestep, self._counts[timestep] % HISTORY] = loss
            self._counts[timestep] += 1

    def state(self) -> dict[str, Tensor]:
        """What :meth:`load` needs to go on."""
        return {
            "losses": torch.from_numpy(self._losses.copy()),
            "counts": torch.from_numpy(self._counts.copy()),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state` gave."""
        self._losses, self._counts = state["losses"].numpy().copy(), state["counts"].numpy().copy()


def make_sampler(name: Literal["uniform", "loss_second_moment"], steps: int) -> UniformSampler:
    """The sampler that a configuration names, over ``steps`` timesteps."""
    return {"uniform": UniformSampler, "loss_second_moment": LossSecondMomentSampler}[name](steps)


def draw_timesteps(
    sampler: UniformSampler, stream: Stream, seed: int, step: int, size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Timesteps int64 [N] of a whole batch, and the weights 1 / (p T), float32 [N], that undo the bias."""
    p = sampler.probabilities()
    timesteps = _generator(stream, seed, step).choice(sampler.steps, size=size, p=p)
    return timesteps, (1 / (p[timesteps] * sampler.steps)).astype(np.float32)
