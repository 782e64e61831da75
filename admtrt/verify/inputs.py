"""Inputs for both sides of a comparison: random images, labels and conditioning for the bundle."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.config import DiffusionConfig
from admtrt.errors import UserError
from admtrt.schedule.levels import EdmLevels
from admtrt.schedule.options import OPTIONS
from admtrt.schedule.process import process_from_config
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.solvers import SOLVERS
from admtrt.schedule.table import sampling_schedule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from admtrt.bundle import Manifest
    from admtrt.config import EdmConfig
    from admtrt.runtime.slots import Images, Labels
    from admtrt.schedule.solvers import Solver

    Values = NDArray[np.float64]

_EDM_LEVELS = 40
BATCHES = (1, 3)
"""Batch sizes compared. The traced size is excluded, since a graph frozen to it would pass."""
_OTHERS = ("threshold", "threshold_max", "direction")
"""Options of solvers on a respaced process that change which rows are made, but not which graphs run."""
_EXAMPLES: dict[str, Any] = {"eta": 0.5, "churn": (4.0, 0.0, 100.0, 1.0)}
"""Example values of numeric options."""


class Inputs:
    """Inputs for the networks of a bundle.

    Args:
        manifest: the bundle's manifest.
        seed: seed of all random numbers.
    """

    def __init__(self, manifest: Manifest, seed: int) -> None:
        self._manifest = manifest
        self._rng = np.random.default_rng(seed)
        unet = manifest.network
        self.image_shape = (unet.in_channels, unet.image_size, unet.image_size)
        self.out_shape = (unet.out_channels, unet.image_size, unet.image_size)
        self.quantile = manifest.threshold_quantile

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
        """Network inputs: random images and noise, weighted by [N] each."""
        shape = (len(signal), *self.image_shape)
        images, drawn = self.uniform(*shape), self.normal(*shape)
        column = (-1, 1, 1, 1)
        return (signal.reshape(column) * images + noise.reshape(column) * drawn).astype(np.float32)

    def labels(self, count: int, shift: int = 0) -> Labels | None:
        """Labels spread over all classes, varied by ``shift``; None without classes."""
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


def samplers(
    manifest: Manifest, process: DiffusionConfig, steps: int, *, guided: bool, every: bool
) -> dict[str, SamplerConfig]:
    """The samplers to compare, by name, with the bundle's recommended scale (1 for 0) and clipping.

    Chosen are solvers that support the processes of both the bundle and the checkpoint, with the bundle's
    graphs: those on a respaced process, with their noise, and the first with memory, since all others run the
    same graphs. With ``every``: all solvers, every value of each single option, and every form of every
    order. A solver that cannot use exactly ``steps`` evaluations uses one more.
    """
    guide = {"scale": (manifest.sampler.scale or 1.0) if guided else 0.0, "clip": manifest.sampler.clip}
    found: dict[str, SamplerConfig] = {}
    for method, solver in SOLVERS.items():
        respaced = solver.steps == "respacing"
        if not (every or respaced) and any(
            SOLVERS[one.method].steps == solver.steps for one in found.values()
        ):
            continue
        variants = _variants(solver) if every or respaced else [_named(solver, {})]
        for name, options in variants:
            if not every and any(option in options for option in _OTHERS):
                continue
            sampler = _fitted(manifest, process, {"method": method, **guide, **options}, steps)
            if sampler is not None:
                found[name] = sampler
    return found


def _variants(solver: Solver) -> list[tuple[str, dict[str, Any]]]:
    changed: list[dict[str, Any]] = [{}]
    for name, default in solver.options.items():
        if name == "threshold_max":
            changed.append({"threshold": "dynamic", name: 1.5})
            continue
        option = OPTIONS[name]
        values = (not default,) if option.flag else solver.narrower.get(name, option.values)
        changed += [{name: value} for value in values if value != default]
        changed += [{name: _EXAMPLES[name]}] if name in _EXAMPLES else []
    if {"order", "form"} <= solver.options.keys():
        changed += [
            {"order": order, "form": form}
            for order, form in product(OPTIONS["order"].values, OPTIONS["form"].values)
            if order != solver.options["order"] and form != solver.options["form"]
        ]
    return [_named(solver, options) for options in changed]


def _named(solver: Solver, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    shown = [name if value is True else f"{name} {value}" for name, value in options.items()]
    return " ".join([solver.name, *shown]), options


def _fitted(
    manifest: Manifest, process: DiffusionConfig, choices: dict[str, Any], steps: int
) -> SamplerConfig | None:
    """The sampler with a possible number of steps, or None if a process or the bundle does not support it."""
    for count in (steps, steps + 1):
        try:
            sampler = SamplerConfig.from_dict({**choices, "steps": str(count)})
            schedules = [sampling_schedule(each, sampler) for each in (manifest.diffusion, process)]
        except UserError:
            continue
        if "update_full" in manifest.graphs or not schedules[0].full:
            return sampler
    return None


@dataclass(frozen=True, eq=False)
class Levels:
    """Noise levels at which networks are compared, the cleanest first.

    Attributes:
        t: the networks' input ``t``, float32 [L].
        signal, noise: weights of the image and of the noise in the state, float64 [L].
    """

    t: NDArray[np.float32]
    signal: Values
    noise: Values

    @classmethod
    def of(cls, process: DiffusionConfig | EdmConfig) -> Levels:
        """All timesteps of a discrete process; for EDM, the grid of consistency models."""
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
    """Steps of the samples of each batch: equal in all batches except the last."""
    chosen = chosen_steps(length)
    alike = [[step] * batch for step in chosen for batch in BATCHES]
    return [np.array(steps) for steps in (*alike, [chosen[0], chosen[len(chosen) // 2], chosen[-1]])]
