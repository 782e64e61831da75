"""DDPM and DDIM under guidance: Algorithms 1 and 2 of Dhariwal & Nichol 2021."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from admtrt.contract import quantile_of
from admtrt.models.diffusion import Diffusion, bounded
from admtrt.models.solvers.problem import guidance_scale
from admtrt.schedule.process import process_from_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from admtrt.models.solvers.problem import Problem, State
    from admtrt.schedule.sampler import SamplerConfig


class Step(Protocol):
    """One guided step of a batch."""

    def __call__(
        self,
        diffusion: Diffusion,
        out: Tensor,
        x_t: Tensor,
        step: Tensor,
        noise: Tensor,
        gradient: Tensor | None,
        sampler: SamplerConfig,
        quantile: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x_{t-1} and the predicted x_0 from the UNet's output at ``step``, int64 [N].

        ``gradient`` is d log p(y | x_t) / dx_t, or None for unguided sampling. ``quantile`` is the quantile
        of dynamic thresholds, as for :func:`~admtrt.contract.threshold_quantile`.
        """
        ...


def ddpm_step(
    diffusion: Diffusion,
    out: Tensor,
    x_t: Tensor,
    step: Tensor,
    noise: Tensor,
    gradient: Tensor | None,
    sampler: SamplerConfig,
    quantile: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1; see :class:`Step`."""
    prediction = diffusion.predict(out, x_t, step, _bound(sampler, quantile))
    mean = prediction.mean
    if gradient is not None:
        scale = diffusion.at(guidance_scale(diffusion.process.sigma, sampler), step)
        mean = mean + scale * prediction.variance * gradient
    noise = noise * (step > 0).view(-1, 1, 1, 1)
    return mean + (0.5 * prediction.log_variance).exp() * noise, prediction.x_0


def ddim_step(
    diffusion: Diffusion,
    out: Tensor,
    x_t: Tensor,
    step: Tensor,
    noise: Tensor,
    gradient: Tensor | None,
    sampler: SamplerConfig,
    quantile: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Algorithm 2, with sigma of DDIM eq. 16; see :class:`Step`."""
    process = diffusion.process
    a, a_prev = process.alpha_bar, process.alpha_bar_prev
    x_0 = diffusion.predict(out, x_t, step, _bound(sampler, quantile)).x_0
    eps = of_x_0 = diffusion.eps_from_x_0(x_t, step, x_0)
    if sampler.option("direction") == "network":
        eps = diffusion.eps_from_x_0(x_t, step, diffusion.predict(out, x_t, step).x_0)
    if gradient is not None:
        scale = guidance_scale(process.sigma, sampler)
        moved = diffusion.at(np.sqrt(1 - a) * scale, step) * gradient
        eps = eps - moved
        # Pure noise, for which eps does not determine x_0, is never guided.
        guided = diffusion.at(scale, step) != 0
        x_0 = torch.where(guided, diffusion.x_0_from_eps(x_t, step, of_x_0 - moved), x_0)
    sigma = sampler.eta * np.sqrt((1 - a_prev) / (1 - a)) * np.sqrt(1 - a / a_prev)
    direction = diffusion.at(np.sqrt(np.maximum(1 - a_prev - sigma**2, 0)), step) * eps
    noise = noise * (step > 0).view(-1, 1, 1, 1)
    return diffusion.at(np.sqrt(a_prev), step) * x_0 + direction + diffusion.at(sigma, step) * noise, x_0


def _bound(sampler: SamplerConfig, quantile: float | None) -> Callable[[Tensor], Tensor]:
    return lambda x_0: bounded(x_0, sampler, quantile_of(x_0[0].numel(), quantile))


def ddpm(problem: Problem) -> Iterator[State]:
    """Ancestral sampling."""
    return _trajectory(problem, ddpm_step)


def ddim(problem: Problem) -> Iterator[State]:
    """DDIM."""
    return _trajectory(problem, ddim_step)


def _trajectory(problem: Problem, one: Step) -> Iterator[State]:
    config = problem.process
    assert config.kind == "discrete"  # as these solvers declare
    process = process_from_config(config, problem.sampler.steps)
    diffusion = Diffusion(config, process, problem.x_T.dtype)
    count = len(process)
    x = problem.x_T
    if problem.start is not None:
        assert problem.image is not None
        count = process.timesteps.tolist().index(problem.start.timestep) + 1
        x = diffusion.q_sample(problem.image, torch.full((len(x),), count - 1), x)
    for index in reversed(range(count)):
        step = torch.full((len(x),), index)
        out, gradient = yield from problem.ask(x, float(process.model_t[index]))
        noise = problem.noise(index)
        x, x_0 = one(diffusion, out, x, step, noise, gradient, problem.sampler, problem.quantile)
        problem.keep(x_0)
    yield problem.end(x, None)
