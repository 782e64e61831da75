"""Likelihood: the variational bound of a UNet or upsampler on images, in bits per dim.

The network may be a checkpoint in PyTorch or an exported graph. Images and noise depend only on the data and
the seed, so both are evaluated on the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from admtrt.errors import AdmtrtError, DataError, RequestError
from admtrt.models.diffusion import Diffusion
from admtrt.runtime.noise import step_noise
from admtrt.runtime.pipeline import consecutive_seeds
from admtrt.runtime.slots import conditions_for
from admtrt.schedule.process import process_from_config
from admtrt.training.losses import variational_bound
from admtrt.training.objectives import shrink

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from admtrt.config import DiffusionConfig, UNetConfig
    from admtrt.data.image_set import ImageSet
    from admtrt.runtime.sampler import Denoiser
    from admtrt.training.losses import Bound


@dataclass(frozen=True)
class Likelihood:
    """The bound, averaged over images.

    Attributes:
        images: number of images.
        bits_per_dim: the prior plus every term.
        standard_error: of ``bits_per_dim``; None for a single image.
        prior: bits per dim of KL(q(x_T | x_0) || N(0, 1)).
        timesteps: of the base process, noisiest first.
        terms: bits per dim of each timestep.
        x_0_mse, eps_mse: errors of the predictions at each timestep.
    """

    images: int
    bits_per_dim: float
    standard_error: float | None
    prior: float
    timesteps: tuple[int, ...]
    terms: tuple[float, ...]
    x_0_mse: tuple[float, ...]
    eps_mse: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def evaluate_nll(
    denoiser: Denoiser,
    config: UNetConfig,
    diffusion: DiffusionConfig,
    data: ImageSet,
    *,
    count: int | None = None,
    steps: str = "",
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _count: None,
) -> Likelihood:
    """Evaluate the bound (Ho et al. eq. 5, with x_0 bounded to [-1, 1] as for published figures).

    Args:
        denoiser: runs the network.
        config: its configuration; an upsampler gets the downsampled images as conditioning.
        diffusion: its process.
        data: result of :func:`admtrt.verify.nll_images.load_images`.
        count: number of images, drawn by the seed; None for all.
        steps: a respacing (:func:`admtrt.schedule.process.retained_timesteps`); the bound of the training
            process needs all steps.
        batch_size: images computed at once; it changes the result by rounding only.
        seed: image i uses the noise of a sample with seed ``seed + i``.
        progress: called with the image-steps done.

    Raises:
        RequestError: if an option is out of range.
        DataError: if there are fewer images.
        AdmtrtError: if the bound is not finite.
    """
    if batch_size < 1:
        raise RequestError(f"batch_size is {batch_size}; expected at least 1")
    seeds = consecutive_seeds(seed, len(data))
    rows = chosen_rows(data, count, seed)
    model = Diffusion(diffusion, process_from_config(diffusion, steps))
    bounds = []
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        bounds.append(_bound(denoiser, config, model, data, part, [seeds[row] for row in part], progress))
    total = _joined([bound.total for bound in bounds])
    if not np.isfinite(total).all():
        raise AdmtrtError(
            f"the bound is not finite for {int((~np.isfinite(total)).sum())} of {len(total)} images",
            hint="The network returns NaN or infinity, or variances without bounds: check its weights.",
        )
    return Likelihood(
        images=len(total),
        bits_per_dim=float(total.mean()),
        standard_error=float(total.std(ddof=1)) / math.sqrt(len(total)) if len(total) > 1 else None,
        prior=float(_joined([bound.prior for bound in bounds]).mean()),
        timesteps=tuple(model.process.timesteps[::-1].tolist()),
        terms=_mean_by_step([bound.terms for bound in bounds]),
        x_0_mse=_mean_by_step([bound.x_0_mse for bound in bounds]),
        eps_mse=_mean_by_step([bound.eps_mse for bound in bounds]),
    )


def chosen_rows(data: ImageSet, count: int | None, seed: int) -> list[int]:
    """Draw indices of images uniformly, ascending."""
    if count is None:
        return list(range(len(data)))
    if count < 1:
        raise RequestError(f"{count} images were asked for; expected at least 1")
    if count > len(data):
        raise DataError(
            f"{count} images were asked for; {data.config.source} has {len(data)}",
            hint="Ask for fewer, or leave the number out to take all.",
        )
    chosen: list[int] = np.sort(np.random.default_rng(seed).permutation(len(data))[:count]).tolist()
    return chosen


def images_of(data: ImageSet, rows: list[int]) -> NDArray[np.float32]:
    """Images in [-1, 1], float32 [N, C, H, W], without augmentation."""
    unused = np.random.default_rng()
    return np.stack([data.image(row, unused) for row in rows])


def conditions_of(
    config: UNetConfig, data: ImageSet, rows: list[int], x_0: Tensor
) -> dict[str, NDArray[Any]]:
    """Inputs of the network besides x and t: labels, and for an upsampler the downsampled images."""
    assert config.num_classes is None or data.labels is not None  # checked at loading
    y = None if data.labels is None else config.own_labels(data.labels[rows])
    low_res = None if config.low_res_size is None else shrink(x_0, config.low_res_size).numpy()
    return conditions_for(config, None, labels=y, low_res=low_res, guided=False)["unet"]


def _bound(
    denoiser: Denoiser,
    config: UNetConfig,
    diffusion: Diffusion,
    data: ImageSet,
    rows: list[int],
    seeds: list[int],
    progress: Callable[[int], None],
) -> Bound:
    """The bound of one batch."""
    x_0 = torch.from_numpy(images_of(data, rows))
    given = conditions_of(config, data, rows, x_0)

    def network(x: Tensor, t: Tensor) -> Tensor:
        out = denoiser.run("unet", {"x": x.numpy(), "t": t.numpy(), **given})["out"]
        progress(len(rows))
        return torch.from_numpy(out)

    def noise(step: int) -> Tensor:
        return torch.from_numpy(step_noise(seeds, [step] * len(seeds), tuple(x_0.shape[1:])))

    return variational_bound(diffusion, network, x_0, noise)


def _joined(values: list[Tensor]) -> NDArray[np.float64]:
    return torch.cat(values).numpy().astype(np.float64)


def _mean_by_step(values: list[Tensor]) -> tuple[float, ...]:
    """Means over the images of [N, S] tensors."""
    return tuple(_joined(values).mean(axis=0).tolist())
