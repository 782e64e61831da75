"""Sample grids during training, drawn by the runtime's own step over a network in PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from admtrt.config import EdmConfig
from admtrt.images import save_grid, to_uint8
from admtrt.models.denoiser import TorchDenoiser
from admtrt.run_config import sampler_for
from admtrt.runtime.sampler import advance
from admtrt.runtime.slots import slots_for
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import sampling_schedule
from admtrt.training.data import batch
from admtrt.training.objectives import shrink

if TYPE_CHECKING:
    from pathlib import Path

    from admtrt.config import DiffusionConfig
    from admtrt.data.image_set import ImageSet
    from admtrt.models.unet import UNet
    from admtrt.runtime.slots import Images, Labels

_STEPS = 25
_SAMPLES = 16  # samples for a network without classes
_MOST_CLASSES = 64
_COLUMNS = 8


def draw_samples(
    network: UNet,
    device: torch.device,
    process: DiffusionConfig | EdmConfig,
    *,
    y: Labels | None,
    low_res: Images | None,
    count: int,
) -> Images:
    """Draw unguided samples, float32 [count, C, H, W]; the same network gives the same samples.

    Uses DDIM or, for ``edm`` processes, the sampler of :func:`~admtrt.run_config.sampler_for`.
    """
    if isinstance(process, EdmConfig):
        sampler = sampler_for(process)
    else:
        sampler = SamplerConfig(method="ddim", steps=str(min(_STEPS, process.steps)), scale=0.0)
    schedule = sampling_schedule(process, sampler)
    slots = slots_for(
        network.config,
        None,
        [schedule] * count,
        range(count),
        labels=y,
        low_res=low_res,
        guided=False,
    )
    denoiser = TorchDenoiser(network, device=device)
    for _ in range(len(schedule)):
        advance(slots, denoiser)
    return slots.x


def draw_grid(
    network: UNet,
    device: torch.device,
    process: DiffusionConfig | EdmConfig,
    data: ImageSet,
    seed: int,
    path: Path,
) -> None:
    """Write a grid of samples: one per class, enlarged images of ``data``, or a few.

    Raises:
        OutputError: if the file cannot be written.
    """
    config = network.config
    y: Labels | None = None
    low_res: Images | None = None
    if config.low_res_size is not None:
        x_0, labels = batch(data, seed, 0, _SAMPLES)
        low_res = shrink(x_0, config.low_res_size).numpy()
        y = None if config.num_classes is None or labels is None else labels.numpy()
    elif config.num_classes is not None:
        y = np.arange(min(config.num_classes, _MOST_CLASSES), dtype=np.int64)
    count = _SAMPLES if y is None else len(y)
    images = draw_samples(network, device, process, y=y, low_res=low_res, count=count)
    names = None if y is None else [data.class_names[label] for label in y]
    save_grid(to_uint8(images), path, _COLUMNS, names)
