"""Training of a judge for small data: a classifier of clean images, whose last features are compared."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from admtrt.data.image_set import load_data, require_classes
from admtrt.errors import ExportError
from admtrt.evaluate.images import training_part
from admtrt.evaluate.kept import row_hashes
from admtrt.export.capture import graph_from_module
from admtrt.export.graphs import EXAMPLE_BATCH
from admtrt.export.write import write_graph
from admtrt.features.judge_network import Judge
from admtrt.training.data import batch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from admtrt.data.image_set import ImageSet
    from admtrt.data.sources import Pixels
    from admtrt.evaluate.extract import Extractor
    from admtrt.run_config import DataConfig

JUDGED = 5000
"""Number of images of the networks' training data, at most, that its accuracy is stated for."""
_WEIGHT_DECAY = 0.02
_WARM_UP = 0.2  # fraction of the steps
_SHIFT = 14  # images are shifted by at most a pixel for so many of their size
_CHECKED = 16  # images for the comparison of graph and PyTorch
_TOLERANCE = 1e-5  # relative to the largest value: float32 sums in another order
_BATCH = 256


def judge_images(config: DataConfig, part: str) -> tuple[ImageSet, ImageSet]:
    """A judge's images, and some images for its accuracy: training images of the networks, not augmented.

    Raises:
        DataError: if nothing is held out, or there are no labels or only one class.
    """
    images = load_data(config)
    require_classes(images, len(images.class_names))
    own, others = training_part(images, part), training_part(images, "train")
    rows = np.random.default_rng(0).permutation(len(others))[:JUDGED]
    return own, replace(others.subset(np.sort(rows)), config=own.config)


def train_judge(
    images: ImageSet,
    augmentation: DataConfig,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    progress: Callable[[int, str], None],
) -> Judge:
    """Train with AdamW; its learning rate rises, then falls along a cosine. Deterministic on one machine.

    Args:
        images: the judge's images.
        augmentation: how the networks flip and crop these images; the judge shifts them as well.
        steps, batch_size, lr, seed: of the training; ``lr`` is the highest.
        progress: called with the steps done.
    """
    torch.manual_seed(seed)
    config = images.config
    judge = Judge(config.image_size, config.channels, len(images.class_names)).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps + 1, pct_start=_WARM_UP, cycle_momentum=False
    )
    augmented = replace(images, config=augmentation)
    for step in range(steps):
        x, y = batch(augmented, seed, step, batch_size)
        assert y is not None  # images without labels were refused
        x = shifted(x, config.image_size // _SHIFT)
        loss = F.cross_entropy(judge.features(x.to(memory_format=torch.channels_last))[1], y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress(1, f"loss {loss.item():.3f}")
    return judge.eval().requires_grad_(False)


def shifted(x: Tensor, most: int) -> Tensor:
    """Move every image of x [N, C, H, W] by up to ``most`` pixels along both axes; the border is repeated."""
    if not most:
        return x
    height, width = x.shape[2:]
    wide = F.pad(x, (most,) * 4, mode="replicate")
    places = torch.randint(0, 2 * most + 1, (len(x), 2)).tolist()
    return torch.stack(
        [image[:, i : i + height, j : j + width] for image, (i, j) in zip(wide, places, strict=True)]
    )


def judge_accuracy(judge: Judge, images: ImageSet) -> float:
    """Fraction of labelled images that a judge classifies correctly."""
    assert images.labels is not None
    right = 0
    for first in range(0, len(images), _BATCH):
        with torch.no_grad():
            logits = judge(torch.from_numpy(_pixels(images, first, _BATCH)))[1]
        right += int((logits.argmax(1).numpy() == images.labels[first : first + _BATCH]).sum())
    return right / len(images)


def judge_graph(judge: Judge, path: Path) -> None:
    """Write ``images`` uint8 [N, H, W, C] -> ``pool``, ``logits``.

    Raises:
        ExportError: if PyTorch cannot capture it.
    """
    shape = (EXAMPLE_BATCH, judge.image_size, judge.image_size, judge.channels)
    example = torch.zeros(shape, dtype=torch.uint8)
    write_graph(graph_from_module(judge, {"images": example}, ["pool", "logits"]), path)


def check_judge(judge: Judge, extractor: Extractor, images: ImageSet) -> None:
    """Compare the exported graph with the network.

    Raises:
        ExportError: if they differ by more than float32 rounding.
    """
    pixels = _pixels(images, 0, _CHECKED)
    with torch.no_grad():
        expected = dict(zip(("pool", "logits"), judge(torch.from_numpy(pixels)), strict=True))
    for name, found in extractor(pixels).items():
        wanted = expected[name].numpy()
        error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
        if not error <= _TOLERANCE:
            raise ExportError(f"the judge's graph is {error:.2g} from PyTorch in '{name}'")


def seen_hashes(images: ImageSet) -> NDArray[np.uint64]:
    """Sorted hashes of a judge's images."""
    parts = []
    for first in range(0, len(images), _BATCH):
        pixels = _pixels(images, first, _BATCH)
        parts.append(row_hashes(pixels.reshape(len(pixels), -1)))
    return np.unique(np.concatenate(parts))


def _pixels(images: ImageSet, first: int, count: int) -> Pixels:
    rows = range(first, min(first + count, len(images)))
    return images.stack(rows, [np.random.default_rng(0)] * len(rows))
