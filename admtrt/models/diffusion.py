"""The diffusion process in PyTorch, written as the papers write it.

It shares the tables of :mod:`admtrt.schedule` with the runtime, but not the formulas of its rows, so that it
can serve as a reference. Training uses it for losses; sampling is in :mod:`admtrt.models.solvers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from admtrt.schedule.parameterisation import log_variance_bounds
from admtrt.schedule.process import Process

if TYPE_CHECKING:
    from collections.abc import Callable

    from admtrt.config import DiffusionConfig
    from admtrt.schedule.sampler import SamplerConfig


class Network(Protocol):
    """A network with its labels and conditioning bound: (x, t) -> out."""

    def __call__(self, x: Tensor, t: Tensor, /) -> Tensor:
        """Run the network."""
        ...


@dataclass(frozen=True)
class Prediction:
    """p(x_{t-1} | x_t); every tensor is [N, C, H, W] or broadcasts to it."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x_0: Tensor


class Diffusion:
    """A (respaced) process on tensors of one dtype; steps are int64 [N] indices into ``process``."""

    def __init__(self, config: DiffusionConfig, process: Process, dtype: torch.dtype = torch.float32) -> None:
        self.config = config
        self.process = process
        self.dtype = dtype

    def __len__(self) -> int:
        return len(self.process)

    def model_t(self, step: Tensor) -> Tensor:
        """The networks' input ``t``, [N]."""
        return self.at(self.process.model_t, step).flatten()

    def q_mean(self, x_0: Tensor, step: Tensor) -> Tensor:
        """Mean of q(x_t | x_0)."""
        return self.at(np.sqrt(self.process.alpha_bar), step) * x_0

    def q_sample(self, x_0: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """Draw from q(x_t | x_0) with the given noise (Ho et al. eq. 4)."""
        return self.q_mean(x_0, step) + self.at(np.sqrt(1 - self.process.alpha_bar), step) * noise

    def q_posterior(self, x_0: Tensor, x_t: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and clipped log variance of q(x_{t-1} | x_t, x_0) (Ho et al. eq. 7)."""
        mean = (
            self.at(self.process.posterior_mean_x0, step) * x_0
            + self.at(self.process.posterior_mean_xt, step) * x_t
        )
        return mean, self.at(self.process.posterior_log_variance, step)

    def predict(
        self, out: Tensor, x_t: Tensor, step: Tensor, bound: Callable[[Tensor], Tensor] | None = None
    ) -> Prediction:
        """Interpret a network's output as p(x_{t-1} | x_t); ``bound``, if given, bounds x_0."""
        variance, log_variance = self._variance(out, x_t, step)
        value = out[:, : x_t.shape[1]]
        if self.config.mean_type == "eps":
            x_0 = self.x_0_from_eps(x_t, step, value)
        elif self.config.mean_type == "x_0":
            x_0 = value
        elif self.config.mean_type == "v":
            x_0 = self.q_mean(x_t, step) - self.at(np.sqrt(1 - self.process.alpha_bar), step) * value
        else:
            weight_x0 = self.at(1 / self.process.posterior_mean_x0, step)
            weight_xt = self.at(self.process.posterior_mean_xt / self.process.posterior_mean_x0, step)
            x_0 = weight_x0 * value - weight_xt * x_t
        if bound is not None:
            x_0 = bound(x_0)
        mean = value if self.config.mean_type == "previous_x" else self.q_posterior(x_0, x_t, step)[0]
        return Prediction(mean=mean, variance=variance, log_variance=log_variance, x_0=x_0)

    def _variance(self, out: Tensor, x_t: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper, fixed_large = log_variance_bounds(self.process)
        if self.config.variance_type == "learned":
            log_variance = out[:, x_t.shape[1] :]
        elif self.config.variance_type == "learned_range":
            fraction = (out[:, x_t.shape[1] :] + 1) / 2
            log_variance = fraction * self.at(upper, step) + (1 - fraction) * self.at(lower, step)
        elif self.config.variance_type == "fixed_large":
            log_variance = self.at(fixed_large, step)
        else:
            return self.at(self.process.posterior_variance, step), self.at(lower, step)
        return log_variance.exp(), log_variance

    def x_0_from_eps(self, x_t: Tensor, step: Tensor, eps: Tensor) -> Tensor:
        """x_0 = x_t / sqrt(alpha_bar) - sqrt(1 / alpha_bar - 1) * eps."""
        a = self.process.alpha_bar
        with np.errstate(divide="ignore"):  # infinite if no signal is left
            return self.at(np.sqrt(1 / a), step) * x_t - self.at(np.sqrt(1 / a - 1), step) * eps

    def eps_from_x_0(self, x_t: Tensor, step: Tensor, x_0: Tensor) -> Tensor:
        """Inverse of :meth:`x_0_from_eps`, also where alpha_bar is 0."""
        return (x_t - self.q_mean(x_0, step)) / self.at(np.sqrt(1 - self.process.alpha_bar), step)

    def v(self, x_0: Tensor, step: Tensor, eps: Tensor) -> Tensor:
        """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, appendix D)."""
        return self.q_mean(eps, step) - self.at(np.sqrt(1 - self.process.alpha_bar), step) * x_0

    def at(self, table: np.ndarray[tuple[int], np.dtype[np.float64]], step: Tensor) -> Tensor:
        """Entries of a float64 table in the process's type, [N, 1, 1, 1], on the device of ``step``."""
        entries = torch.from_numpy(np.ascontiguousarray(table)).to(step.device)[step]
        return entries.to(self.dtype).view(-1, 1, 1, 1)


def clipped(x_0: Tensor) -> Tensor:
    """x_0 within [-1, 1]."""
    return x_0.clamp(-1, 1)


def bounded(x_0: Tensor, sampler: SamplerConfig, quantile: float) -> Tensor:
    """Bound x_0 as a sampler does: to +-c, or dynamically (Saharia et al. 2022, section 2.3).

    Args:
        x_0: [N, C, H, W].
        sampler: its ``clip`` is c, its ``threshold_max`` the largest dynamic threshold.
        quantile: quantile of each sample's |x_0| that is its threshold if it exceeds c.
    """
    c = sampler.bound
    if c is None:
        return x_0
    if sampler.option("threshold") != "dynamic":
        return x_0.clamp(-c, c)
    s = torch.quantile(x_0.abs().flatten(1), quantile, dim=1).clamp(c, sampler.option("threshold_max"))
    s = s.view(-1, 1, 1, 1)
    return c * (torch.minimum(torch.maximum(x_0, -s), s) / s)
