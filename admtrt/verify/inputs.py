"""What both sides of a comparison are given: random images, labels and conditioning that fit the bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from admtrt.config import SamplerConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from admtrt.bundle import Manifest
    from admtrt.runtime.sampler import Images, Labels

BATCHES = (1, 3)
"""Batch sizes compared; the traced one is not among them, since a graph that remembers it would pass."""


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What a batch is drawn under; each is None where the networks do not take it.

    Attributes:
        unet_y, guide_y: int64 [N], labels of the UNet and of the guidance.
        low_res: float32 [N, C, h, w] in [-1, 1].
    """

    unet_y: Labels | None
    guide_y: Labels | None
    low_res: Images | None


class Inputs:
    """Inputs for the networks of a bundle.

    Args:
        manifest: of the bundle.
        seed: of everything random.
    """

    def __init__(self, manifest: Manifest, seed: int) -> None:
        self._manifest = manifest
        self._rng = np.random.default_rng(seed)
        unet = manifest.unet
        self.image_shape = (unet.in_channels, unet.image_size, unet.image_size)
        self.out_shape = (unet.out_channels, unet.image_size, unet.image_size)

    def normal(self, *shape: int) -> Images:
        """Standard normal values."""
        return self._rng.standard_normal(shape, dtype=np.float32)

    def uniform(self, *shape: int) -> Images:
        """Values in [-1, 1)."""
        return self._rng.uniform(-1, 1, shape).astype(np.float32)

    def noisy_images(self, alpha_bar: NDArray[np.float64]) -> Images:
        """x_t of random images, each at its own noise level, [N, C, H, W]."""
        a = alpha_bar[:, None, None, None]
        shape = (len(a), *self.image_shape)
        return (np.sqrt(a) * self.uniform(*shape) + np.sqrt(1 - a) * self.normal(*shape)).astype(np.float32)

    def labels(self, count: int, shift: int = 0) -> Labels | None:
        """Labels spread over all classes, others for another ``shift``; None where there are no classes."""
        classes = self._manifest.num_classes
        if classes is None:
            return None
        labels: Labels = (np.arange(count, dtype=np.int64) * max(1, classes // count) + shift) % classes
        return labels

    def conditioning(self, count: int, shift: int = 0) -> Conditioning:
        """Labels and low-resolution images for those networks that take them."""
        manifest = self._manifest
        y, size = self.labels(count, shift), manifest.unet.low_res_size
        return Conditioning(
            unet_y=manifest.unet.own_labels(y),
            guide_y=y if manifest.classifier is not None else None,
            low_res=None if size is None else self.uniform(count, manifest.unet.in_channels, size, size),
        )


def samplers(manifest: Manifest, steps: int, *, guided: bool) -> dict[str, SamplerConfig]:
    """The samplers compared, by name: the bundle's recommended scale (1 for 0) and clipping."""
    choices = {"ddpm": ("ddpm", 0.0), "ddim": ("ddim", 0.0), "ddim eta 0.5": ("ddim", 0.5)}
    shared = {
        "steps": str(steps),
        "scale": (manifest.sampler.scale or 1.0) if guided else 0.0,
        "clip": manifest.sampler.clip,
    }
    return {
        name: SamplerConfig.from_dict({"method": method, "eta": eta, **shared})
        for name, (method, eta) in choices.items()
    }


def chosen_steps(length: int) -> list[int]:
    """The cleanest step of a process, one near it, the middle, and the noisiest."""
    return sorted({0, max(1, length // 50), length // 2, length - 1})


def step_batches(length: int) -> list[NDArray[np.int64]]:
    """Steps of the samples of every batch compared: alike within most, different within the last."""
    chosen = chosen_steps(length)
    alike = [[step] * batch for step in chosen for batch in BATCHES]
    return [np.array(steps) for steps in (*alike, [chosen[0], chosen[len(chosen) // 2], chosen[-1]])]
