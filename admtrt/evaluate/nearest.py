"""Memorisation: the distance of each sample to its nearest training image, compared with held-out images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from admtrt.evaluate.images import chosen_images
from admtrt.evaluate.manifold import nearest_images
from admtrt.images import save_grid, to_pillow

if TYPE_CHECKING:
    from pathlib import Path

    from admtrt.evaluate.frechet import Features, Matrix
    from admtrt.evaluate.images import ImageSource, Labels, Pixels

PERCENTILE = 1.0
"""Percentile of the held-out images' distances below which a sample is suspiciously near."""
SHOWN = 16


@dataclass(frozen=True, eq=False)
class Nearest:
    """Distances in the space of the features.

    Attributes:
        distances: float64 [N], distance of each sample to its nearest training image.
        indices: int64 [N], index of that image.
        training: number of training images.
        threshold: the :data:`PERCENTILE` of held-out images' distances; None without held-out images.
        held_out: number of held-out images.
    """

    distances: Matrix
    indices: Labels
    training: int
    threshold: float | None
    held_out: int | None

    @property
    def worst(self) -> Labels:
        """The samples that are nearest to a training image, nearest first."""
        return np.argsort(self.distances, kind="stable")[:SHOWN]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. Without memorisation, ``share_below`` is about 1%."""
        below = None if self.threshold is None else float((self.distances < self.threshold).mean())
        return {
            "training": self.training,
            "held_out": self.held_out,
            "threshold": self.threshold,
            "share_below": below,
            "median": float(np.median(self.distances)),
            "equal": int((self.distances == 0).sum()),
            "worst": [
                {
                    "sample": int(row),
                    "training": int(self.indices[row]),
                    "distance": float(self.distances[row]),
                }
                for row in self.worst
            ],
        }


def find_nearest(samples: Features, training: Features, held_out: Features | None) -> Nearest:
    """Compare samples [N, D] and held-out images [K, D] with training images [M, D]."""
    distances, indices = nearest_images(samples, training)
    threshold = None
    if held_out is not None:
        threshold = float(np.percentile(nearest_images(held_out, training)[0], PERCENTILE))
    return Nearest(distances, indices, len(training), threshold, None if held_out is None else len(held_out))


def save_pairs(nearest: Nearest, samples: ImageSource, training: ImageSource, path: Path) -> None:
    """Write a picture of the nearest pairs, each sample left of its training image.

    Raises:
        OutputError: if it cannot be written.
    """
    rows = nearest.worst
    left = _as_rgb(chosen_images(samples, rows))
    right = _as_rgb(chosen_images(training, nearest.indices[rows]))
    height, width = left.shape[1:3]
    if right.shape[1:3] != left.shape[1:3]:
        resized = [to_pillow(one).resize((width, height), Image.Resampling.BICUBIC) for one in right]
        right = np.stack([np.asarray(one) for one in resized])
    pairs = np.stack([left, right], axis=1).reshape(-1, height, width, 3)
    labels = [
        text
        for row in rows
        for text in (f"sample {row}", f"{nearest.distances[row]:.3g}: {nearest.indices[row]}")
    ]
    save_grid(pairs, path, columns=8, labels=labels)


def _as_rgb(images: Pixels) -> Pixels:
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
