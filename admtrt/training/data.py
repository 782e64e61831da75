"""Batches of training images as a pure function of the seed, the step and the process."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import torch

from admtrt.data.image_set import stream_of
from admtrt.images import from_uint8

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from admtrt.data.image_set import ImageSet

_ORDER, _AUGMENTATION = 0, 1  # streams of random numbers of one training seed


def batch(
    data: ImageSet, seed: int, step: int, size: int, *, rank: int = 0, world: int = 1
) -> tuple[Tensor, Tensor | None]:
    """The images and labels of one step in one process.

    The run reads one endless sequence of images, with a new order in each epoch. Step k takes the next ``size
    * world`` images, and process ``rank`` every ``world``-th of those. The processes' batches together thus
    equal a single process's batch, including augmentation.

    Args:
        data: not empty; may be smaller than a batch.
        seed: seed of the order and the augmentation.
        step: from 0.
        size: number of images of this process.
        rank: index of this process, from 0.
        world: number of processes.

    Returns:
        x_0: float32 [size, C, H, W] in [-1, 1].
        y: int64 [size], or None without labels.
    """
    first, count = step * size * world, len(data)
    positions = range(first + rank, first + size * world, world)
    rows = [int(_order(count, seed, position // count)[position % count]) for position in positions]
    rngs = [stream_of(seed, _AUGMENTATION, position) for position in positions]
    images = np.ascontiguousarray(from_uint8(data.stack(rows, rngs)).transpose(0, 3, 1, 2))
    y = None if data.labels is None else torch.from_numpy(data.labels[rows])
    return torch.from_numpy(images), y


@functools.lru_cache(maxsize=4)  # consecutive steps share an epoch
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return stream_of(seed, _ORDER, epoch).permutation(count)
