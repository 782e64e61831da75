"""A judge for small data: a classifier of clean images whose penultimate layer gives the features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from admtrt.config import ClassifierConfig
from admtrt.data.image_set import load_data, require_classes
from admtrt.errors import DataError, ExportError
from admtrt.evaluate.images import training_part
from admtrt.evaluate.kept import row_hashes
from admtrt.export.capture import graph_from_module
from admtrt.export.graphs import EXAMPLE_BATCH
from admtrt.export.write import write_graph
from admtrt.models.classifier import Classifier
from admtrt.training.data import batch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from admtrt.data.image_set import ImageSet
    from admtrt.data.sources import Pixels
    from admtrt.evaluate.extract import Extractor
    from admtrt.run_config import DataConfig

WIDTH = 32
"""Channels at the finest level; the coarsest has four times as many, 128 features."""
_SMALLEST = 16  # no further level below this size
_WEIGHT_DECAY = 0.05
_CHECKED = 16  # images for the comparison of graph and PyTorch
_TOLERANCE = 1e-5  # relative to the largest value: float32 sums in another order
_JUDGED = 2000
_BATCH = 256


def judge_images(config: DataConfig, part: str) -> tuple[ImageSet, ImageSet]:
    """A judge's training images, and some images for its accuracy: training images of the networks.

    Raises:
        DataError: if nothing is held out, or there are no labels or only one class.
    """
    images = load_data(config)
    require_classes(images, len(images.class_names))
    others = training_part(images, "train")
    rows = np.random.default_rng(0).permutation(len(others))[:_JUDGED]
    return training_part(images, part), others.subset(np.sort(rows))


def judge_config(config: DataConfig, classes: int) -> ClassifierConfig:
    """The network for images of a size.

    Raises:
        DataError: for a size that cannot be halved twice.
    """
    mult: tuple[float, ...] = (1, 2, 4)
    while config.image_size >> (len(mult) - 1) > _SMALLEST and config.image_size % (1 << len(mult)) == 0:
        mult = (1, *mult)
    try:
        return ClassifierConfig(
            image_size=config.image_size,
            in_channels=config.channels,
            model_channels=WIDTH,
            num_res_blocks=1,
            channel_mult=mult,
            attention_resolutions=(),
            num_classes=classes,
            pool="adaptive",
        )
    except ValueError:
        raise DataError(
            f"images of {config.image_size} pixels cannot be halved {len(mult) - 1} times, as the judge does",
            hint="Choose an image_size of 4 or more.",
        ) from None


class Judge(nn.Module):
    """uint8 images [N, H, W, C] to features [N, 128] and logits [N, classes]; the classifier's t is 0."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.head, self.last = classifier.out[:3], classifier.out[3:]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``pool`` and ``logits``."""
        return self.features(images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``pool`` and ``logits`` of x [N, C, H, W] in [-1, 1]."""
        embedding = self.classifier.embed_time(torch.zeros(1))
        pooled = self.head(self.classifier.encode(x, embedding)[-1])
        return pooled.flatten(1), self.last(pooled)

    def save(self, path: Path) -> None:
        """The classifier's weights, as safetensors."""
        from safetensors.torch import save_file

        save_file(self.classifier.state_dict(), path)

    def accuracy(self, images: ImageSet) -> float:
        """Fraction of labelled images that it classifies correctly."""
        assert images.labels is not None
        right = 0
        for first in range(0, len(images), _BATCH):
            pixels = _pixels(images, first, _BATCH)
            with torch.no_grad():
                logits = self(torch.from_numpy(pixels))[1]
            right += int((logits.argmax(1).numpy() == images.labels[first : first + _BATCH]).sum())
        return right / len(images)

    def check(self, extractor: Extractor, images: ImageSet) -> None:
        """Compare the exported graph with this network.

        Raises:
            ExportError: if they differ by more than float32 rounding.
        """
        pixels = _pixels(images, 0, _CHECKED)
        with torch.no_grad():
            expected = dict(zip(("pool", "logits"), self(torch.from_numpy(pixels)), strict=True))
        for name, found in extractor(pixels).items():
            wanted = expected[name].numpy()
            error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
            if not error <= _TOLERANCE:
                raise ExportError(f"the judge's graph is {error:.2g} from PyTorch in '{name}'")

    @staticmethod
    def seen(images: ImageSet) -> NDArray[np.uint64]:
        """Sorted hashes of images."""
        parts = []
        for first in range(0, len(images), _BATCH):
            pixels = _pixels(images, first, _BATCH)
            parts.append(row_hashes(pixels.reshape(len(pixels), -1)))
        return np.unique(np.concatenate(parts))


def train_judge(
    images: ImageSet,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    progress: Callable[[int, str], None],
) -> Judge:
    """Train with AdamW and a learning rate falling linearly to 0. Deterministic on one machine."""
    torch.manual_seed(seed)
    judge = Judge(Classifier(judge_config(images.config, len(images.class_names))))
    optimizer = torch.optim.AdamW(judge.classifier.parameters(), lr=lr, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, total_iters=steps)
    judge.train()
    for step in range(steps):
        x, y = batch(images, seed, step, batch_size)
        assert y is not None  # images without labels were refused
        loss = F.cross_entropy(judge.features(x)[1], y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress(1, f"loss {loss.item():.3f}")
    return judge.eval().requires_grad_(False)


def judge_graph(judge: Judge, path: Path) -> None:
    """Write ``images`` uint8 [N, H, W, C] -> ``pool``, ``logits``.

    Raises:
        ExportError: if PyTorch cannot capture it.
    """
    config = judge.classifier.config
    example = torch.zeros(
        (EXAMPLE_BATCH, config.image_size, config.image_size, config.in_channels), dtype=torch.uint8
    )
    write_graph(graph_from_module(judge, {"images": example}, ["pool", "logits"]), path)


def _pixels(images: ImageSet, first: int, count: int) -> Pixels:
    rows = range(first, min(first + count, len(images)))
    return images.stack(rows, [np.random.default_rng()] * len(rows))
