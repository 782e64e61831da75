"""Sets of images of one size and number of channels: read, crop, flip and split them."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from admtrt.brief import listed
from admtrt.data.sources import Labels, Pixels, Skipped, read_image, read_source, with_channels
from admtrt.errors import DataError
from admtrt.images import from_uint8, to_pillow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from admtrt.run_config import DataConfig

Item = TypeVar("Item")
_SPLIT_SEED = 0  # fixed: every network holds out the same images
_CROP_FRACTIONS = (0.8, 1.0)  # range of a random crop's side, relative to the smaller side


@dataclass(frozen=True)
class ImageSet:
    """Images of one size and number of channels, read on demand.

    Attributes:
        config: how to crop, flip and convert them.
        images: uint8 [N, H, W, C] with the configured channels, or N image files.
        labels: int64 [N], indices of ``class_names``; None without labels.
        class_names: empty when there are no labels.
        numbered: whether labels match the network's classes by number, not by name.
        skipped: the unusable files that were left out.
    """

    config: DataConfig
    images: Pixels | tuple[Path, ...]
    labels: Labels | None = None
    class_names: tuple[str, ...] = ()
    numbered: bool = False
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int, rng: np.random.Generator) -> NDArray[np.float32]:
        """One image, float32 [C, H, W] in [-1, 1]; see :meth:`pixels`."""
        return np.ascontiguousarray(from_uint8(self.pixels(index, rng)).transpose(2, 0, 1))

    def pixels(self, index: int, rng: np.random.Generator) -> Pixels:
        """One image, uint8 [H, W, C]; every random choice comes from ``rng``.

        Raises:
            DataError: naming the file, if it was removed or damaged since it was checked.
        """
        size, stored = self.config.image_size, self.images[index]
        if not self.config.random_crop and not isinstance(stored, Path) and stored.shape[:2] == (size, size):
            pixels: Pixels = stored
        else:
            opened = read_image(stored, self.config) if isinstance(stored, Path) else to_pillow(stored)
            pixels = random_crop(opened, size, rng) if self.config.random_crop else center_crop(opened, size)
        if self.config.random_flip and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return pixels

    def stack(self, rows: Sequence[int], rngs: Sequence[np.random.Generator]) -> Pixels:
        """Several images, uint8 [n, H, W, C], each with its own random generator; see :meth:`pixels`."""
        if not isinstance(self.images, tuple):
            return np.stack(list(map(self.pixels, rows, rngs)))
        return np.stack(list[Pixels](in_threads(self.pixels, rows, rngs)))

    def subset(self, rows: NDArray[np.int64]) -> ImageSet:
        """The images at the given indices, with the classes of the whole set."""
        images = self.images
        return replace(
            self,
            images=tuple(images[row] for row in rows) if isinstance(images, tuple) else images[rows],
            labels=None if self.labels is None else self.labels[rows],
        )


def load_data(config: DataConfig) -> ImageSet:
    """Read and check the whole set.

    Raises:
        DataError, MissingDependencyError: as :func:`admtrt.data.sources.read_source`.
    """
    source = read_source(config)
    images = source.images if isinstance(source.images, tuple) else _fitted(source.images, config)
    return ImageSet(config, images, source.labels, source.class_names, source.numbered, source.skipped)


def _fitted(images: Pixels, config: DataConfig) -> Pixels:
    """Convert the channels and, unless random crops are used, crop, once for all epochs."""
    size = config.image_size
    if images.shape[1:] == (size, size, config.channels):
        return images
    converted = (with_channels(to_pillow(pixels), config) for pixels in images)
    return np.stack(
        [_to_pixels(image) if config.random_crop else center_crop(image, size) for image in converted]
    )


def require_classes(data: ImageSet, num_classes: int) -> None:
    """Check that the data can train a network of ``num_classes`` classes.

    Raises:
        DataError: if it has no labels, another number of classes, or no image of a class.
    """
    source, found = data.config.source, len(data.class_names)
    hint = "Images are classed by subfolder or by file name (<class>_<anything>): see data.label_from."
    if data.labels is None:
        raise DataError(f"{source} has no labels, and {num_classes} classes were to be learned", hint=hint)
    if found == 1 != num_classes:
        raise DataError(
            f"{source} has one class only ('{data.class_names[0]}'), and {num_classes} were to be learned",
            hint=hint,
        )
    if found != num_classes:
        named = f" ({listed(data.class_names)})"
        parts = sorted({"train", "val", "test"} & set(data.class_names))
        raise DataError(
            f"{source} has {found} classes{named}, and the network has num_classes {num_classes}",
            hint=f"Set data.source to one of its parts, {Path(source, parts[0])}."
            if parts and not data.numbered
            else f"Set num_classes = {found}, or correct the data.",
        )
    absent = sorted(set(range(found)) - set(np.unique(data.labels).tolist()))
    if absent:
        raise DataError(
            f"{source} has no image of {len(absent)} of {found} classes ({listed(absent)})",
            hint="Classes are numbered from 0 on.",
        )


def split(data: ImageSet, hold_out: float) -> tuple[ImageSet, ImageSet]:
    """Split into training images and held-out images, the given fraction of each class.

    The split depends only on the labels. If ``hold_out`` > 0, each class with two or more images has at least
    one on either side. Held-out images are never augmented.
    """
    labels = np.zeros(len(data), np.int64) if data.labels is None else data.labels
    held = np.zeros(len(data), bool)
    for label in np.unique(labels) if hold_out else ():
        rows = np.flatnonzero(labels == label)
        count = min(max(1, round(hold_out * len(rows))), len(rows) - 1)
        held[stream_of(_SPLIT_SEED, int(label)).permutation(rows)[:count]] = True
    plain = data.config.model_copy(update={"random_crop": False, "random_flip": False})
    return data.subset(np.flatnonzero(~held)), replace(data.subset(np.flatnonzero(held)), config=plain)


def in_threads(read: Callable[..., Item], *arguments: Sequence[Any]) -> list[Item]:
    """Like ``map``, in threads, for a function that reads images: Pillow releases the GIL while decoding."""
    with _signals_wait(), ThreadPoolExecutor() as pool:
        return list(pool.map(read, *arguments))


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Defer signals that end the process to the end of the block.

    Otherwise an exception raised by a handler could leave a lock of the pool held, and the process would
    hang.
    """
    if threading.current_thread() is not threading.main_thread():  # only it receives signals
        yield
        return
    heard = list[int]()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if handler is not None}  # of Python's
    for each in before:
        signal.signal(each, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for number in heard:
            signal.raise_signal(number)


def stream_of(seed: int, *stream: int) -> np.random.Generator:
    """An independent random generator of one seed."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


def _to_pixels(image: Image.Image) -> Pixels:
    """Convert to uint8 [H, W, C]."""
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def center_crop(image: Image.Image, size: int) -> Pixels:
    """The middle square of an image scaled so that its smaller side is ``size``: uint8 [size, size, C]."""
    pixels = _scaled(image, size)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Pixels:
    """A random square of 80 to 100 % of the smaller side, scaled to ``size``: uint8 [size, size, C].

    Three draws: the scale, the top, the left.
    """
    smallest, largest = (math.ceil(size / fraction) for fraction in reversed(_CROP_FRACTIONS))
    pixels = _scaled(image, int(rng.integers(smallest, largest + 1)))
    top = int(rng.integers(pixels.shape[0] - size + 1))
    left = int(rng.integers(pixels.shape[1] - size + 1))
    return pixels[top : top + size, left : left + size]


def _scaled(image: Image.Image, smaller_side: int) -> Pixels:
    # Halve by averaging first: bicubic alone would alias, and published models were trained this way.
    while min(image.size) >= 2 * smaller_side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = smaller_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return _to_pixels(image.resize(size, Image.Resampling.BICUBIC))
