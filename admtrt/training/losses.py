"""Training objectives and the variational bound (Ho et al. 2020; Nichol & Dhariwal 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from admtrt.models.diffusion import clipped

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from admtrt.models.diffusion import Diffusion, Network
    from admtrt.schedule.process import Process

_NATS_PER_BIT = math.log(2.0)
_SNR_CAP = 5.0  # gamma of min-SNR weighting, as in the paper
_SMALLEST_MASS = 1e-12  # keeps log() finite if the discretised mass underflows


def gaussian_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """Elementwise KL(N_1 || N_2) in nats."""
    return 0.5 * (
        -1.0
        + log_variance_2
        - log_variance_1
        + (log_variance_1 - log_variance_2).exp()
        + (mean_1 - mean_2).square() * (-log_variance_2).exp()
    )


def _normal_cdf(x: Tensor) -> Tensor:
    # The tanh approximation instead of erf, as used for published likelihoods.
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the probability of the 8-bit bin around x under N(mean, exp(log_scale)^2), in nats.

    ``x`` has uint8 values mapped to [-1, 1]; the two end bins extend to infinity.
    """
    centered, inverse_std = x - mean, (-log_scale).exp()
    cdf_upper = _normal_cdf(inverse_std * (centered + 1 / 255))
    cdf_lower = _normal_cdf(inverse_std * (centered - 1 / 255))
    mass = torch.where(x < -0.999, cdf_upper, torch.where(x > 0.999, 1 - cdf_lower, cdf_upper - cdf_lower))
    return mass.clamp(min=_SMALLEST_MASS).log()


def flat_mean(x: Tensor) -> Tensor:
    """Mean over everything but the batch: [N, ...] -> [N]."""
    return x.flatten(1).mean(dim=1)


def bound_term(
    diffusion: Diffusion, out: Tensor, x_0: Tensor, x_t: Tensor, step: Tensor, *, clip: bool
) -> tuple[Tensor, Tensor]:
    """One timestep's term of the variational bound in bits per dim [N], and the predicted x_0.

    The decoder's negative log likelihood at step 0, KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) elsewhere.
    """
    mean, log_variance = diffusion.q_posterior(x_0, x_t, step)
    prediction = diffusion.predict(out, x_t, step, clipped if clip else None)
    kl = flat_mean(gaussian_kl(mean, log_variance, prediction.mean, prediction.log_variance))
    log_scale = (0.5 * prediction.log_variance).expand_as(x_0)
    nll = -flat_mean(discretized_gaussian_log_likelihood(x_0, prediction.mean, log_scale))
    return torch.where(step == 0, nll, kl) / _NATS_PER_BIT, prediction.x_0


@dataclass(frozen=True)
class Loss:
    """A training loss and its parts, each [N]; ``mse`` and ``bound`` are None where the loss has none."""

    total: Tensor
    mse: Tensor | None = None
    bound: Tensor | None = None


def training_loss(
    diffusion: Diffusion,
    network: Network,
    x_0: Tensor,
    step: Tensor,
    noise: Tensor,
    *,
    kind: str,
    mse_weight: Tensor | None = None,
) -> Loss:
    """The objective of one batch at the given steps.

    Args:
        diffusion: the process; its configuration says what the network predicts.
        network: (x_t, t) -> out.
        x_0: [N, C, H, W] in [-1, 1].
        step: int64 [N].
        noise: standard normal, like ``x_0``.
        kind: ``simple``: mean squared error of the predicted quantity. ``hybrid``: that plus T/1000 times
            the bound's term, through which only the variance is learned (IDDPM eq. 16). ``kl``: the
            bound's term. ``vlb``: the same times T, an unbiased estimate of the whole bound.
        mse_weight: [N], weight of the squared error in the total.
    """
    x_t = diffusion.q_sample(x_0, step, noise)
    out = network(x_t, diffusion.model_t(step))
    if kind in ("kl", "vlb"):
        bound, _ = bound_term(diffusion, out, x_0, x_t, step, clip=False)
        return Loss(total=bound * len(diffusion) if kind == "vlb" else bound, bound=bound)
    channels = x_0.shape[1]
    value = out[:, :channels]
    target = {
        "eps": lambda: noise,
        "x_0": lambda: x_0,
        "v": lambda: diffusion.v(x_0, step, noise),
        "previous_x": lambda: diffusion.q_posterior(x_0, x_t, step)[0],
    }[diffusion.config.mean_type]()
    mse = flat_mean((target - value).square())
    weighted = mse if mse_weight is None else mse * mse_weight
    if kind == "simple" or not diffusion.config.learns_sigma:
        return Loss(total=weighted, mse=mse)
    frozen = torch.cat([value.detach(), out[:, channels:]], dim=1)
    bound, _ = bound_term(diffusion, frozen, x_0, x_t, step, clip=False)
    bound = bound * (len(diffusion) / 1000)
    return Loss(total=weighted + bound, mse=mse, bound=bound)


def snr_weights(name: str, process: Process, mean_type: str) -> NDArray[np.float64]:
    """Weights [T] of the squared error of eps or x_0 by the signal-to-noise ratio of each timestep.

    ``min-snr``: min(SNR, 5) of the error of x_0 (Hang et al. 2023). ``p2``: 1 / (1 + SNR) of the error of eps
    (Choi et al. 2022, k = gamma = 1).
    """
    snr = process.alpha_bar / (1 - process.alpha_bar)
    of_eps = {"min-snr": np.minimum(snr, _SNR_CAP) / snr, "p2": 1 / (1 + snr)}[name]
    return of_eps * snr if mean_type == "x_0" else of_eps  # |x_0 error|^2 = |eps error|^2 / SNR


@dataclass(frozen=True)
class Bound:
    """The whole variational bound in bits per dim.

    Attributes:
        total: [N], prior plus every term.
        prior: [N], KL(q(x_T | x_0) || N(0, 1)).
        terms: [N, S], the last step (S - 1) first.
        x_0_mse, eps_mse: [N, S], errors of the predictions, in the same order.
    """

    total: Tensor
    prior: Tensor
    terms: Tensor
    x_0_mse: Tensor
    eps_mse: Tensor


@torch.no_grad()
def variational_bound(
    diffusion: Diffusion,
    network: Network,
    x_0: Tensor,
    noise: Callable[[int], Tensor],
) -> Bound:
    """Evaluate every term of the bound with x_0 clipped; ``noise(step)`` returns that step's noise."""
    terms, x_0_errors, eps_errors = [], [], []
    for index in reversed(range(len(diffusion))):
        step = torch.full((len(x_0),), index, device=x_0.device)
        drawn = noise(index)
        x_t = diffusion.q_sample(x_0, step, drawn)
        term, predicted = bound_term(
            diffusion, network(x_t, diffusion.model_t(step)), x_0, x_t, step, clip=True
        )
        terms.append(term)
        x_0_errors.append(flat_mean((predicted - x_0).square()))
        eps_errors.append(flat_mean((diffusion.eps_from_x_0(x_t, step, predicted) - drawn).square()))
    last = torch.full((len(x_0),), len(diffusion) - 1, device=x_0.device)
    log_variance = torch.log(torch.tensor(1 - diffusion.process.alpha_bar[-1], dtype=torch.float32))
    zero = torch.zeros((), device=x_0.device)
    prior = (
        flat_mean(gaussian_kl(diffusion.q_mean(x_0, last), log_variance.to(x_0.device), zero, zero))
        / _NATS_PER_BIT
    )
    stacked = torch.stack(terms, dim=1)
    return Bound(
        total=stacked.sum(dim=1) + prior,
        prior=prior,
        terms=stacked,
        x_0_mse=torch.stack(x_0_errors, dim=1),
        eps_mse=torch.stack(eps_errors, dim=1),
    )
