"""The noise schedule, respacing and the coefficients of every sampling step, in float64.

Notation (Ho et al. 2020; Nichol & Dhariwal 2021): ``beta`` per step, ``alpha_bar`` the running product of
``1 - beta``, ``alpha_bar_prev`` the same one step earlier (1 before the first step). A *process* is a base
schedule or a respaced subset of its steps; ``beta`` of a respaced process is recomputed so that its
``alpha_bar`` are those of the retained steps.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from admtrt.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from admtrt.config import DiffusionConfig, SamplerConfig

    Float64 = NDArray[np.float64]
    Float32 = NDArray[np.float32]

_COSINE_OFFSET = 0.008  # IDDPM, section 3.2: keeps beta from vanishing near t = 0
_MAX_BETA = 0.999


def betas(schedule: str, steps: int) -> Float64:
    """Variances of the forward process, float64 [steps] in (0, 1).

    ``linear`` runs from 1e-4 to 0.02 for 1000 steps (Ho et al. 2020) and is scaled by 1000 / steps
    otherwise; ``cosine`` is IDDPM eq. 17.
    """
    if schedule == "linear":
        scale = 1000 / steps
        return np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)
    grid = [
        math.cos((i / steps + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2) ** 2
        for i in range(steps + 1)
    ]
    return np.array([min(1 - grid[i + 1] / grid[i], _MAX_BETA) for i in range(steps)])


def retained_timesteps(steps: int, respacing: str) -> tuple[int, ...]:
    """Timesteps of the base process that a respaced process keeps, ascending.

    Args:
        steps: length of the base process.
        respacing: ``""`` (all), ``"250"`` (that many, evenly spaced), ``"90,60,60,20,20"`` (so many in each
            of equal sections) or ``"ddim25"`` (the integer stride that gives 25 steps, DDIM App. D).

    Raises:
        RequestError: if the text is none of these, or the process cannot be divided so.
    """
    text = respacing.strip()
    if not text:
        return tuple(range(steps))
    if text.startswith("ddim"):
        retained = _strided_timesteps(steps, text)
    else:
        retained = _sectioned_timesteps(steps, text)
    if len(retained) < 2:
        raise RequestError(
            f"steps {respacing!r} keeps {len(retained)} of {steps} timesteps; sampling needs at least 2",
            hint="Ask for more steps, e.g. 'ddim25' or '50'.",
        )
    return retained


def _strided_timesteps(steps: int, text: str) -> tuple[int, ...]:
    count = _positive_int(text[len("ddim") :], text)
    for stride in range(1, steps + 1):
        if len(range(0, steps, stride)) == count:
            return tuple(range(0, steps, stride))
    fault = f"steps {text!r}: no integer stride divides {steps} timesteps into exactly {count}"
    if count > steps:
        raise RequestError(fault, hint=f"At most {steps} steps are possible: 'ddim{steps}'.")
    possible = sorted({len(range(0, steps, stride)) for stride in range(1, steps)})
    nearest = min(possible, key=lambda n: abs(n - count))
    raise RequestError(
        fault,
        hint=f"The nearest that exists is 'ddim{nearest}'; '{count}' spaces them evenly instead.",
    )


def _sectioned_timesteps(steps: int, text: str) -> tuple[int, ...]:
    counts = [_positive_int(part, text) for part in text.split(",")]
    if len(counts) > steps:
        raise RequestError(f"steps {text!r} has {len(counts)} sections for {steps} timesteps")
    size, extra = divmod(steps, len(counts))
    retained: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise RequestError(
                f"steps {text!r}: section {section + 1} has {length} timesteps, which cannot give {count}",
                hint=f"Ask for at most {length} there.",
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # Accumulated, not multiplied: the rounding of ties then agrees with the published sampler.
        position = 0.0
        for _ in range(count):
            retained.append(start + round(position))
            position += stride
        start += length
    return tuple(sorted(set(retained)))


def _positive_int(part: str, whole: str) -> int:
    text = part.strip()
    # Nine digits are more than any process has, and keep int() from refusing absurdly long numbers.
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or int(text) < 1:
        raise RequestError(
            f"steps {whole!r}: {part!r} is not a positive whole number",
            hint="Write e.g. '250', 'ddim25' or '90,60,60,20,20'.",
        )
    return int(text)


@dataclass(frozen=True, eq=False)
class Process:
    """Tables of a (respaced) diffusion process with S steps; every array is float64 [S].

    Attributes:
        timesteps: the retained timesteps of the base process (int64).
        model_t: what the networks are given as ``t``: the timesteps, times 1000 / T where the model was
            trained on rescaled timesteps.
        beta, alpha_bar, alpha_bar_prev: of this process.
        posterior_variance: beta~, of q(x_{t-1} | x_t, x_0) (Ho et al. eq. 7); 0 at the first step.
        posterior_log_variance: its log, with the second step's value at the first.
        posterior_mean_x0, posterior_mean_xt: the weights of x_0 and x_t in that posterior's mean.
    """

    timesteps: NDArray[np.int64]
    model_t: Float64
    beta: Float64
    alpha_bar: Float64
    alpha_bar_prev: Float64
    posterior_variance: Float64
    posterior_log_variance: Float64
    posterior_mean_x0: Float64
    posterior_mean_xt: Float64

    def __len__(self) -> int:
        return len(self.beta)


def process_from_config(config: DiffusionConfig, respacing: str = "") -> Process:
    """Tables for a diffusion configuration, respaced as :func:`retained_timesteps` says."""
    retained = retained_timesteps(config.steps, respacing)
    base_alpha_bar: Float64 = np.cumprod(1.0 - betas(config.schedule, config.steps), dtype=np.float64)
    timesteps = np.array(retained, dtype=np.int64)
    alpha_bar: Float64 = base_alpha_bar[timesteps]
    alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
    beta = 1.0 - alpha_bar / alpha_bar_prev
    posterior_variance = beta * (1.0 - alpha_bar_prev) / (1.0 - alpha_bar)
    return Process(
        timesteps=timesteps,
        model_t=timesteps.astype(np.float64) * config.time_factor,
        beta=beta,
        alpha_bar=alpha_bar,
        alpha_bar_prev=alpha_bar_prev,
        posterior_variance=posterior_variance,
        posterior_log_variance=np.log(np.append(posterior_variance[1], posterior_variance[1:])),
        posterior_mean_x0=beta * np.sqrt(alpha_bar_prev) / (1.0 - alpha_bar),
        posterior_mean_xt=(1.0 - alpha_bar_prev) * np.sqrt(1.0 - beta) / (1.0 - alpha_bar),
    )


COEFFICIENTS = (
    "x0_from_x", "x0_from_out", "clip", "x0_shift",
    "prev_from_x0", "prev_from_x", "prev_from_out",
    "log_weight", "log_weight_from_v", "guidance", "noise",
)  # fmt: skip
"""Columns of the update's coefficient rows, in order; see :func:`step_coefficients`."""


def step_coefficients(config: DiffusionConfig, process: Process, sampler: SamplerConfig) -> Float32:
    """Coefficients of every sampling step, float32 [S, len(COEFFICIENTS)], row i for step i of ``process``.

    One update serves guided DDPM (Algorithm 1 of Dhariwal & Nichol) and guided DDIM (Algorithm 2), every
    parameterisation and every variance, because each is linear once x_0 is clipped::

        x_0    = clamp(x0_from_x * x + x0_from_out * out, -clip, clip)
        w      = exp(log_weight + log_weight_from_v * v)
        x_prev = prev_from_x0 * x_0 + prev_from_x * x + prev_from_out * out
                 + guidance * w * g + noise * sqrt(w) * z
        pred   = x_0 + x0_shift * g

    ``g`` is the unscaled classifier gradient, ``z`` standard normal noise, ``v`` the network's variance
    channels. In DDPM, w is the variance of the step; in DDIM it is 1. The combinations are formed in
    float64 and rounded once, which avoids the 1 / sqrt(alpha_bar) amplification of the textbook order of
    operations.

    Raises:
        RequestError: if no step lies in the sampler's guidance interval.
    """
    table = dict.fromkeys(COEFFICIENTS, np.zeros(len(process)))
    table["clip"] = np.full(len(process), 1.0 if sampler.clip else np.finfo(np.float32).max)
    table["x0_from_x"], table["x0_from_out"] = _x0_weights(config.mean_type, process)
    not_last = (np.arange(len(process)) > 0).astype(np.float64)
    a, a_prev = process.alpha_bar, process.alpha_bar_prev
    scale = _guidance_scales(process, sampler)
    if sampler.method == "ddim":
        sigma = sampler.eta * np.sqrt((1 - a_prev) / (1 - a)) * np.sqrt(1 - a / a_prev)
        from_eps = np.sqrt(np.maximum(1 - a_prev - sigma**2, 0.0))
        table["prev_from_x"] = from_eps / np.sqrt(1 - a)
        table["prev_from_x0"] = np.sqrt(a_prev) - from_eps * np.sqrt(a / (1 - a))
        table["x0_shift"] = scale * (1 - a) / np.sqrt(a)
        table["guidance"] = np.sqrt(a_prev) * table["x0_shift"] - scale * from_eps * np.sqrt(1 - a)
        table["noise"] = sigma * not_last
    else:
        if config.mean_type == "previous_x":
            table["prev_from_out"] = np.ones(len(process))
        else:
            table["prev_from_x0"] = process.posterior_mean_x0
            table["prev_from_x"] = process.posterior_mean_xt
        table["log_weight"], table["log_weight_from_v"] = _log_variance_weights(config.variance_type, process)
        # The true posterior variance of the last step is 0: its clipped log is not the log of it.
        guided = not_last if config.variance_type == "fixed_small" else np.ones(len(process))
        table["guidance"] = scale * guided
        table["noise"] = not_last
    return np.stack([table[name] for name in COEFFICIENTS], axis=1).astype(np.float32)


def _guidance_scales(process: Process, sampler: SamplerConfig) -> Float64:
    """The guidance scale of each step: 0 outside the sampler's interval of noise levels."""
    if sampler.guidance_interval is None or not sampler.scale:
        return np.full(len(process), sampler.scale)
    low, high = sampler.guidance_interval
    sigma = np.sqrt((1 - process.alpha_bar) / process.alpha_bar)
    inside = (low < sigma) & (sigma <= high)
    if not inside.any():
        raise RequestError(
            f"the guidance interval {low:g} to {high:g} holds none of the {len(process)} steps, "
            f"whose noise levels are {sigma[0]:.4g} to {sigma[-1]:.4g}",
            hint="Widen the interval, or use scale 0 for samples without guidance.",
        )
    return np.where(inside, sampler.scale, 0.0)


def _x0_weights(mean_type: str, process: Process) -> tuple[Float64, Float64]:
    """Weights of x_t and of the network's output in the predicted x_0."""
    if mean_type == "eps":
        return 1 / np.sqrt(process.alpha_bar), -np.sqrt(1 / process.alpha_bar - 1)
    if mean_type == "x_0":
        return np.zeros(len(process)), np.ones(len(process))
    return -process.posterior_mean_xt / process.posterior_mean_x0, 1 / process.posterior_mean_x0


def _log_variance_weights(variance_type: str, process: Process) -> tuple[Float64, Float64]:
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
    fixed_large = np.append(process.posterior_variance[1], process.beta[1:])
    return process.posterior_log_variance, np.log(process.beta), np.log(fixed_large)


@dataclass(frozen=True, eq=False)
class SamplingSchedule:
    """What a sample needs of its schedule, in the order in which it is used: entry 0 is the noisiest step.

    Attributes:
        model_t: float32 [S], the ``t`` given to the graphs.
        coefficients: float32 [S, K], rows of :func:`step_coefficients`.
        step: int64 [S], index of the step in its process (S-1 down to 0); it also names the step's noise.
        timesteps: int64 [S], timestep of the base process.
    """

    model_t: Float32
    coefficients: Float32
    step: NDArray[np.int64]
    timesteps: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.step)


@functools.lru_cache(maxsize=64)
def sampling_schedule(diffusion: DiffusionConfig, sampler: SamplerConfig) -> SamplingSchedule:
    """The schedule of one sample under a sampler (method, steps, scale, eta, clipping)."""
    process = process_from_config(diffusion, sampler.steps)
    coefficients = step_coefficients(diffusion, process, sampler)
    arrays: Sequence[NDArray[np.generic]] = (
        process.model_t[::-1].astype(np.float32),
        coefficients[::-1].copy(),
        np.arange(len(process), dtype=np.int64)[::-1].copy(),
        process.timesteps[::-1].copy(),
    )
    for array in arrays:
        array.flags.writeable = False
    return SamplingSchedule(*arrays)  # type: ignore[arg-type]
