"""Likelihood by the probability-flow ODE (Song et al. 2021, section 4.3), in bits per dim.

In x~ = x_0 + S eps the flow is dx~ / d log S = x~ - D(x~, S), D the network's prediction of x_0. Along the
flow, log p changes by the negative divergence. Hutchinson's estimate v' J v of the divergence needs one
vector-Jacobian product, computed in the same graph as the network.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from admtrt.errors import RequestError
from admtrt.runtime.noise import initial_noise, step_noise
from admtrt.runtime.pipeline import consecutive_seeds
from admtrt.schedule.levels import DiscreteLevels, levels_of
from admtrt.schedule.parameterisation import x0_weights
from admtrt.verify.nll import chosen_rows, conditions_of, images_of
from admtrt.verify.ode import integrate

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from admtrt.config import DiffusionConfig, EdmConfig, UNetConfig
    from admtrt.data.image_set import ImageSet
    from admtrt.runtime.sampler import Denoiser
    from admtrt.schedule.levels import Level, NoiseLevels

    Array = NDArray[np.float64]

BIN = 2 / 255
"""Width of a grey level in images of [-1, 1]."""
_DIVERGENCE = 0  # counter of the noise for the estimate


@dataclass(frozen=True)
class FlowLikelihood:
    """The likelihood by the flow, averaged over images.

    Attributes:
        images: number of images.
        bits_per_dim: minus log2 of the density at the smallest noise level, of images with uniform noise of a
            grey level's width, per dimension and in units of a grey level.
        standard_error: of ``bits_per_dim``, including that of Hutchinson's estimate; None for a single image.
        prior: the part of ``bits_per_dim`` from the density at the largest noise level.
        solver_error: bits per dim; sum over the solver's steps of the difference of its two orders.
        tolerance: tolerance of the solver.
        evaluations: mean number of evaluations of the network with its derivative per image.
    """

    images: int
    bits_per_dim: float
    standard_error: float | None
    prior: float
    solver_error: float
    tolerance: float
    evaluations: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def evaluate_flow(
    denoiser: Denoiser,
    config: UNetConfig,
    process: DiffusionConfig | EdmConfig,
    data: ImageSet,
    *,
    count: int | None = None,
    tolerance: float = 1e-5,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int, str], None] = lambda _images, _text: None,
) -> FlowLikelihood:
    """Evaluate the likelihood of the deterministic sampler's density.

    Args:
        denoiser: runs the graph ``unet_vector_jacobian``.
        config: configuration of the network.
        process: its process.
        data: result of :func:`admtrt.verify.nll_images.load_images`.
        count: number of images, drawn by the seed; None for all.
        tolerance: of a step, in x relative to S + a grey level, and in bits per dim.
        batch_size: images computed at once; it changes the result by rounding only.
        seed: image i uses the noise of a sample with seed ``seed + i``.
        progress: called with the images done since the last call, and the batch's position.

    Raises:
        RequestError: if an option is out of range, or the network predicts x_{t-1}.
        DataError: if there are fewer images.
        AdmtrtError: if the solution is not finite.
    """
    if batch_size < 1:
        raise RequestError(f"batch_size is {batch_size}; expected at least 1")
    if not 1e-9 <= tolerance <= 1e-1:
        raise RequestError(f"tolerance is {tolerance:g}; expected 1e-9 to 0.1")
    if getattr(process, "mean_type", None) == "previous_x":
        raise RequestError("the network predicts x_{t-1} (mean_type previous_x), which has no such flow")
    seeds = consecutive_seeds(seed, len(data))
    rows = chosen_rows(data, count, seed)
    levels = levels_of(process)
    start, end = levels.cleanest, _noisiest(levels)
    bits: list[Array] = []
    errors: list[Array] = []
    evaluations: list[NDArray[np.int64]] = []
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        chosen = [seeds[row] for row in part]
        images = images_of(data, part)
        x = (images + (uniform(chosen, images.shape[1:]) - 0.5) * BIN).astype(np.float64)
        given = conditions_of(config, data, part, torch.from_numpy(images))
        flow = _Flow(denoiser, config, process, levels, given, chosen, x.shape)

        def advanced(s: Array) -> None:
            progress(0, f"{float((s + start.lam).mean()) / (start.lam - end.lam):.0%} of these {len(s)}")

        state = np.concatenate([x.reshape(len(x), -1), np.zeros((len(x), 1))], axis=1)
        solved = integrate(
            flow.derivative, state, -start.lam, -end.lam, flow.scale(tolerance), progress=advanced
        )
        size = state.shape[1] - 1
        scale = levels.c_in(end) / levels.prior_scale(end)
        squares = (solved.y[:, :-1] * scale) ** 2
        prior = -0.5 * squares.sum(1) + size * (math.log(scale) - 0.5 * math.log(2 * math.pi))
        per_dim = 1 / (size * math.log(2))
        bits.append(np.stack([-(prior + solved.y[:, -1]) * per_dim, -prior * per_dim]) - math.log2(BIN))
        errors.append(solved.error[:, -1] * per_dim)
        evaluations.append(solved.evaluations)
        progress(len(part), "")
    total, prior = np.concatenate(bits, axis=1)
    return FlowLikelihood(
        images=len(total),
        bits_per_dim=float(total.mean()),
        standard_error=float(total.std(ddof=1)) / math.sqrt(len(total)) if len(total) > 1 else None,
        prior=float(prior.mean()),
        solver_error=float(np.concatenate(errors).mean()),
        tolerance=tolerance,
        evaluations=float(np.concatenate(evaluations).mean()),
    )


class _Flow:
    """The flow of a batch and its divergence, as a derivative with respect to s = log S."""

    def __init__(
        self,
        denoiser: Denoiser,
        config: UNetConfig,
        process: DiffusionConfig | EdmConfig,
        levels: NoiseLevels,
        given: dict[str, NDArray[Any]],
        seeds: list[int],
        shape: tuple[int, ...],
    ) -> None:
        self._denoiser, self._process, self._levels, self._given = denoiser, process, levels, given
        self._shape = shape
        noise = step_noise(seeds, [_DIVERGENCE] * len(seeds), shape[1:])
        self._probe = np.where(noise < 0, -1.0, 1.0)
        more = config.out_channels - shape[1]  # the flow does not use a learned variance
        zeros = np.zeros((shape[0], more, *shape[2:]))
        self._cotangent = np.concatenate([self._probe, zeros], axis=1).astype(np.float32)

    def derivative(self, s: Array, state: Array) -> Array:
        """The derivative of (x~, log density), [N, D + 1]."""
        levels = [self._levels.at_sigma(math.exp(value)) for value in s.tolist()]
        c_in = np.array([self._levels.c_in(level) for level in levels])
        from_x, from_out = x0_weights(self._process, levels)
        x = state[:, :-1]
        scaled = (x * c_in[:, None]).reshape(self._shape)
        results = self._denoiser.run(
            "unet_vector_jacobian",
            {
                "x": scaled.astype(np.float32),
                "t": np.array([level.t for level in levels], np.float32),
                **self._given,
                "cotangent": self._cotangent,
            },
        )
        out = results["out"][:, : self._shape[1]].astype(np.float64).reshape(x.shape)
        x_0 = from_x[:, None] * scaled.reshape(x.shape) + from_out[:, None] * out
        product = (results["grad"].astype(np.float64) * self._probe).reshape(x.shape).sum(1)
        size = x.shape[1]
        divergence = size - c_in * (from_x * size + from_out * product)
        return np.concatenate([x - x_0, divergence[:, None]], axis=1)

    def scale(self, tolerance: float) -> Callable[[Array], Array]:
        """The error allowed per step: see :func:`evaluate_flow`."""
        size = math.prod(self._shape[1:])

        def allowed(s: Array) -> Array:
            widths = np.repeat((np.exp(s) + BIN)[:, None], size, axis=1)
            # A single component, while the mean of squares is over all components.
            density = np.full((len(s), 1), size * math.log(2) / math.sqrt(size + 1))
            return tolerance * np.concatenate([widths, density], axis=1)

        return allowed


def _noisiest(levels: NoiseLevels) -> Level:
    """The largest noise level in training; fast solvers start at a smaller one."""
    if isinstance(levels, DiscreteLevels):
        return levels.at_timestep(levels.config.steps - 1)
    return levels.noisiest


def uniform(seeds: list[int], shape: tuple[int, ...]) -> Array:
    """Uniform values in [0, 1] per sample, from the angle of two normal numbers."""
    a, b = initial_noise(seeds, shape), step_noise(seeds, [_DIVERGENCE + 1] * len(seeds), shape)
    return np.arctan2(a.astype(np.float64), b) / (2 * math.pi) + 0.5
