"""The discrete process: noise schedule, respacing and the tables of a respaced process, in float64.

Notation (Ho et al. 2020; Nichol & Dhariwal 2021): ``beta`` per step, ``alpha_bar`` the running product of ``1
- beta``, ``alpha_bar_prev`` its value one step earlier (1 before the first step). A *process* is a base
schedule or a respaced subset of its steps; ``beta`` of a respaced process is recomputed so that its
``alpha_bar`` are those of the retained steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from admtrt.config import EdmConfig
from admtrt.errors import RequestError
from admtrt.schedule.spacing import is_spacing, spaced_timesteps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from admtrt.config import DiffusionConfig, NoiseConfig

    Float64 = NDArray[np.float64]

_COSINE_OFFSET = 0.008  # IDDPM, section 3.2: keeps beta from vanishing near t = 0
_MAX_BETA = 0.999


def require_discrete(process: DiffusionConfig | EdmConfig, what: str, whose: str) -> DiffusionConfig:
    """Check that a process is discrete, and return it.

    Raises:
        RequestError: if it is not.
    """
    if isinstance(process, EdmConfig):
        raise RequestError(f"{what} needs a discrete process, and this {whose}'s is of kind 'edm'")
    return process


def betas(config: NoiseConfig) -> Float64:
    """Variances of the forward process, float64 [steps] in (0, 1); the last is 1 where no signal is left.

    ``linear`` runs from 1e-4 to 0.02 for 1000 steps (Ho et al. 2020) and is scaled by 1000 / steps
    otherwise, unless its ends are given; ``cosine`` is IDDPM eq. 17; ``scaled_linear`` is linear in the
    square root (Rombach et al. 2022), and ``sigmoid`` the logistic function between -6 and 6.
    """
    steps, start, end = config.steps, config.beta_start, config.beta_end
    if config.schedule == "cosine":
        grid = [
            math.cos((i / steps + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2) ** 2
            for i in range(steps + 1)
        ]
        made = np.array([min(1 - grid[i + 1] / grid[i], _MAX_BETA) for i in range(steps)])
    elif start is None or end is None:  # both are needed, and only linear has them
        scale = 1000 / steps
        made = np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)
    elif config.schedule == "scaled_linear":
        made = np.linspace(math.sqrt(start), math.sqrt(end), steps) ** 2
    elif config.schedule == "sigmoid":
        made = (end - start) / (1 + np.exp(-np.linspace(-6.0, 6.0, steps))) + start
    else:
        made = np.linspace(start, end, steps)
    return _without_last_signal(made) if config.zero_terminal_snr else made


def _without_last_signal(made: Float64) -> Float64:
    """Rescale betas so that sqrt(alpha_bar) ends at 0, with the same start (Lin et al. 2024, algorithm 1)."""
    signal = np.sqrt(np.cumprod(1 - made))
    first, last = signal[0], signal[-1]
    alpha_bar = ((signal - last) * (first / (first - last))) ** 2
    return 1 - np.append(alpha_bar[0], alpha_bar[1:] / alpha_bar[:-1])


def retained_timesteps(steps: int, respacing: str) -> tuple[int, ...]:
    """Timesteps of the base process that a respaced process keeps, ascending.

    Args:
        steps: length of the base process.
        respacing: ``""`` (all), ``"250"`` (that many, evenly spaced), ``"90,60,60,20,20"`` (numbers of steps
            in equal sections), ``"ddim25"`` (the integer stride that gives 25 steps, DDIM App. D), or one of
            diffusers' spacings, see :func:`~admtrt.schedule.spacing.spaced_timesteps`.

    Raises:
        RequestError: if the text has none of these forms, or the process has too few steps.
    """
    text = respacing.strip()
    if not text:
        return tuple(range(steps))
    if is_spacing(text):
        return spaced_timesteps(steps, text)
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
        # Accumulate instead of multiplying, so that ties round as in the published sampler.
        position = 0.0
        for _ in range(count):
            retained.append(start + round(position))
            position += stride
        start += length
    return tuple(sorted(set(retained)))


def _positive_int(part: str, whole: str) -> int:
    text = part.strip()
    # At most nine digits: more than any process has, and int() raises for very long numbers.
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
        model_t: the networks' input ``t``: the timesteps, multiplied by 1000 / T if the model was trained on
            rescaled timesteps.
        beta, alpha_bar, alpha_bar_prev: of this process.
        posterior_variance: beta~, of q(x_{t-1} | x_t, x_0) (Ho et al. eq. 7); 0 at the first step.
        posterior_log_variance: its log; the first step repeats the second's value.
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

    @property
    def sigma(self) -> Float64:
        """The noise level S = sqrt((1 - alpha_bar) / alpha_bar) of each step; infinite without signal."""
        with np.errstate(divide="ignore"):
            return np.sqrt((1 - self.alpha_bar) / self.alpha_bar)


def process_from_config(config: DiffusionConfig, respacing: str = "") -> Process:
    """Tables for a diffusion configuration, respaced as :func:`retained_timesteps` says."""
    retained = retained_timesteps(config.steps, respacing)
    base_alpha_bar: Float64 = np.cumprod(1.0 - betas(config), dtype=np.float64)
    timesteps = np.array(retained, dtype=np.int64)
    alpha_bar: Float64 = base_alpha_bar[timesteps]
    alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
    beta = 1.0 - alpha_bar / alpha_bar_prev
    posterior_variance = beta * (1.0 - alpha_bar_prev) / (1.0 - alpha_bar)
    first_variance = posterior_variance[1] if len(beta) > 1 else beta[0]  # the first step adds no noise
    return Process(
        timesteps=timesteps,
        model_t=timesteps.astype(np.float64) * config.time_factor,
        beta=beta,
        alpha_bar=alpha_bar,
        alpha_bar_prev=alpha_bar_prev,
        posterior_variance=posterior_variance,
        posterior_log_variance=np.log(np.append(first_variance, posterior_variance[1:])),
        posterior_mean_x0=beta * np.sqrt(alpha_bar_prev) / (1.0 - alpha_bar),
        posterior_mean_xt=(1.0 - alpha_bar_prev) * np.sqrt(1.0 - beta) / (1.0 - alpha_bar),
    )
