"""Parameterisations: x_0 as a weighted sum of state and network output, and DDPM's variance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from admtrt.config import EdmConfig
from admtrt.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from admtrt.config import DiffusionConfig
    from admtrt.schedule.levels import Level
    from admtrt.schedule.process import Process

    Float64 = NDArray[np.float64]


def x0_weights(config: DiffusionConfig | EdmConfig, levels: Sequence[Level]) -> tuple[Float64, Float64]:
    """Weights of the state and of the network's output in the predicted x_0 at each level, float64 [R].

    EDM's preconditioning is eq. 7 of Karras et al. 2022; with ``boundary``, that of Song et al. 2023,
    appendix C, which is the identity at the smallest level.

    Raises:
        RequestError: for a network that predicts x_{t-1}, which only DDPM and DDIM can use.
    """
    S = np.exp(-np.array([level.lam for level in levels]))
    if isinstance(config, EdmConfig):
        above, data = S - config.sigma_min if config.boundary else S, config.sigma_data
        scale = np.hypot(S, data)
        return scale * data**2 / (above**2 + data**2), above * data / scale
    if config.mean_type == "eps":
        return np.hypot(1.0, S), -S
    if config.mean_type == "x_0":
        return np.zeros_like(S), np.ones_like(S)
    if config.mean_type == "v":
        return 1 / np.hypot(1.0, S), -S / np.hypot(1.0, S)
    raise RequestError(
        "this network predicts x_{t-1} (mean_type previous_x), which depends on the steps of ddpm and ddim",
        hint="Use --method ddpm or ddim.",
    )


def process_x0_weights(mean_type: str, process: Process) -> tuple[Float64, Float64]:
    """Like :func:`x0_weights`, at the steps of a respaced process, float64 [S]."""
    if mean_type == "eps":
        return 1 / np.sqrt(process.alpha_bar), -np.sqrt(1 / process.alpha_bar - 1)
    if mean_type == "x_0":
        return np.zeros(len(process)), np.ones(len(process))
    if mean_type == "v":
        return np.sqrt(process.alpha_bar), -np.sqrt(1 - process.alpha_bar)
    return -process.posterior_mean_xt / process.posterior_mean_x0, 1 / process.posterior_mean_x0


def log_variance_weights(variance_type: str, process: Process) -> tuple[Float64, Float64]:
    """Constant and weight of v in the log variance of p(x_{t-1} | x_t) (IDDPM eq. 15 for learned_range)."""
    lower, upper, fixed_large = log_variance_bounds(process)
    zeros = np.zeros(len(process))
    if variance_type == "learned_range":
        return (upper + lower) / 2, (upper - lower) / 2
    if variance_type == "learned":
        return zeros, np.ones(len(process))
    return (lower if variance_type == "fixed_small" else fixed_large), zeros


def log_variance_bounds(process: Process) -> tuple[Float64, Float64, Float64]:
    """Log of beta~ (clipped), of beta, and of the fixed-large variance (beta~ of step 1 at step 0)."""
    log_beta = np.log(process.beta)
    fixed_large = np.append(process.posterior_log_variance[0], log_beta[1:])
    return process.posterior_log_variance, log_beta, fixed_large
