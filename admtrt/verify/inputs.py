"""What both sides of a comparison are given: random images, labels and conditioning that fit the bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from admtrt.config import DiffusionConfig
from admtrt.schedule.levels import EdmLevels
from admtrt.schedule.process import process_from_config
from admtrt.schedule.sampler import SamplerConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from admtrt.bundle import Manifest
    from admtrt.config import EdmConfig
    from admtrt.runtime.slots import Images, Labels

    Values = NDArray[np.float64]

_EDM_LEVELS = 40
BATCHES = (1, 3)
"""Batch sizes compared; the traced one is not among them, since a graph that remembers it would pass."""


class Inputs:
    """Inputs for the networks of a bundle.

    Args:
        manifest: of the bundle.
        seed: of everything random.
    """

    def __init__(self, manifest: Manifest, seed: int) -> None:
        self._manifest = manifest
        self._rng = np.random.default_rng(seed)
        unet = manifest.network
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
        return self.states(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))

    def states(self, signal: Values, noise: Values) -> Images:
        """Random images and noise, each with its own weights [N]: what the networks are given."""
        shape = (len(signal), *self.image_shape)
        images, drawn = self.uniform(*shape), self.normal(*shape)
        column = (-1, 1, 1, 1)
        return (signal.reshape(column) * images + noise.reshape(column) * drawn).astype(np.float32)

    def labels(self, count: int, shift: int = 0) -> Labels | None:
        """Labels spread over all classes, others for another ``shift``; None where there are no classes."""
        classes = self._manifest.num_classes
        if classes is None:
            return None
        labels: Labels = (np.arange(count, dtype=np.int64) * max(1, classes // count) + shift) % classes
        return labels

    def low_res(self, count: int) -> Images | None:
        """Random images for an upsampler, float32 [N, C, h, w]; None for other networks."""
        unet = self._manifest.network
        if unet.low_res_size is None:
            return None
        return self.uniform(count, unet.in_channels, unet.low_res_size, unet.low_res_size)


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


@dataclass(frozen=True, eq=False)
class Levels:
    """Noise levels at which networks are compared, the cleanest first.

    Attributes:
        t: what the networks are given, float32 [L].
        signal, noise: weights of the image and of the noise in the state, float64 [L].
    """

    t: NDArray[np.float32]
    signal: Values
    noise: Values

    @classmethod
    def of(cls, process: DiffusionConfig | EdmConfig) -> Levels:
        """Every timestep of a discrete process; of another, the grid that consistency models count."""
        if isinstance(process, DiffusionConfig):
            base = process_from_config(process)
            a = base.alpha_bar
            return cls(base.model_t.astype(np.float32), np.sqrt(a), np.sqrt(1 - a))
        levels = EdmLevels(process)
        grid = levels.grid("karras", levels.cleanest, levels.noisiest, _EDM_LEVELS - 1)
        signal = np.array([levels.c_in(level) for level in grid])
        sigma = np.array([level.sigma for level in grid])
        return cls(np.array([level.t for level in grid], np.float32), signal, signal * sigma)

    def __len__(self) -> int:
        return len(self.t)


def chosen_steps(length: int) -> list[int]:
    """The cleanest step of a process, one near it, the middle, and the noisiest."""
    return sorted({0, max(1, length // 50), length // 2, length - 1})


def step_batches(length: int) -> list[NDArray[np.int64]]:
    """Steps of the samples of every batch compared: alike within most, different within the last."""
    chosen = chosen_steps(length)
    alike = [[step] * batch for step in chosen for batch in BATCHES]
    return [np.array(steps) for steps in (*alike, [chosen[0], chosen[len(chosen) // 2], chosen[-1]])]
