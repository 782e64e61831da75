"""Sets of images from any supported source, read block by block in a fixed order."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import ImageOps

from admtrt.config_files import load_config
from admtrt.data.image_set import ImageSet, in_threads, load_data, split, stream_of
from admtrt.data.sources import DIGITS, open_image, read_image, read_source
from admtrt.errors import DataError, RequestError
from admtrt.npz import Member, NpzFile
from admtrt.reading import read_json
from admtrt.run_config import DataConfig, RunConfig
from admtrt.runtime.bulk import LARGEST_REQUEST, REQUEST
from admtrt.runtime.shards import SHARDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from admtrt.runtime.shards import Shards

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]

PARTS = ("all", "train", "held-out", "judge", "floor")
"""Parts of a training file's data: ``judge`` and ``floor`` are the two halves of ``held-out``."""
_LOSSLESS = (".png", ".bmp", ".pgm", ".ppm")
_LOSSY = (".jpg", ".jpeg", ".webp")
_READ_ROWS = 256
_HALVES_SEED = 1


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Images of one size.

    Attributes:
        kind: kind of the source, in a word.
        count: number of images.
        shape: height, width and channels (1 or 3).
        read: all images in order, uint8 [n, H, W, C], in parts of any size; raises DataError if an image can
            no longer be read.
        labels: int64 [N]; None without labels.
        run: folder of the run that drew them; None for other sources.
        asked: number of samples of the whole run; None if unknown.
    """

    kind: str
    count: int
    shape: tuple[int, int, int]
    read: Callable[[], Iterator[Pixels]]
    labels: Labels | None = None
    run: Path | None = None
    asked: int | None = None

    def __len__(self) -> int:
        return self.count


def blocks(source: ImageSource, rows: int) -> Iterator[Pixels]:
    """The images of a source in blocks of a fixed size."""
    waiting: list[Pixels] = []
    held = 0
    for part in source.read():
        start = 0
        while start < len(part):
            taken = part[start : start + rows - held]
            waiting.append(taken)
            held, start = held + len(taken), start + len(taken)
            if held == rows:
                yield waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
                waiting, held = [], 0
    if held:
        yield np.concatenate(waiting)


def chosen_images(source: ImageSource, rows: NDArray[np.int64]) -> Pixels:
    """Read some images, uint8 [len(rows), H, W, C], in the requested order."""
    kept: dict[int, Pixels] = {}
    wanted, first = np.unique(rows), 0
    for part in source.read():
        own = wanted[(wanted >= first) & (wanted < first + len(part))]
        kept |= {int(row): part[row - first] for row in own}
        first += len(part)
    return np.stack([kept[int(row)] for row in rows])


def chosen_rows(held: int, count: int, seed: int) -> NDArray[np.int64]:
    """Draw ``count`` indices of images uniformly, ascending.

    Raises:
        RequestError: if there are fewer.
    """
    if count < 1:
        raise RequestError(f"{count} images were asked for; expected at least 1")
    if count > held:
        raise RequestError(
            f"{count} images were asked for; there are {held}",
            hint="Ask for fewer, or leave the number out to take all.",
        )
    return np.sort(np.random.default_rng(seed).permutation(held)[:count])


def draw(source: ImageSource, count: int | None, seed: int) -> ImageSource:
    """Draw ``count`` images of a source by the seed; None takes all.

    Raises:
        RequestError: if there are fewer.
    """
    if count is None:
        return source
    rows = chosen_rows(len(source), count, seed)

    def read() -> Iterator[Pixels]:
        first = 0
        for part in source.read():
            own = rows[(rows >= first) & (rows < first + len(part))] - first
            if len(own):
                yield part[own]
            first += len(part)

    labels = None if source.labels is None else source.labels[rows]
    return replace(source, count=count, labels=labels, read=read)


def open_images(text: str, *, size: int | None = None, lossy: bool = False) -> ImageSource:
    """Open images: a run, a folder of PNG files, an .npz file, IDX files, the digits or a training file.

    Args:
        text: a path; ``digits``; or ``CONFIG.toml[:PART]``, the data of a training file or one of its
            :data:`PARTS`.
        size: crop to squares of this size, as training does; None takes the images as they are.
        lossy: accept JPEG files, too.

    Raises:
        DataError: if there are no usable images.
        RequestError: for a part or a size that does not fit.
    """
    config, part = _training_file(text)
    if config is not None:
        if size is not None and size != config.image_size:
            raise RequestError(f"--size is {size}, but {text} has data.image_size {config.image_size}")
        return training_images(training_part(load_data(config), part))
    path = Path(text).expanduser()
    if text != DIGITS and not path.exists():
        raise DataError(
            f"{text} does not exist",
            hint="Name a run's folder, a folder of PNG files, an .npz file or a training file.",
        )
    if size is not None:
        return _cropped(text, path, size)
    if path.is_dir() and (path / REQUEST).exists():
        return _run_images(path)
    if path.suffix == ".npz":
        return npz_images(NpzFile.open(path))
    if path.is_dir() and not any(path.glob("*idx3-ubyte*")):
        return _folder_images(path, lossy=lossy)
    return _whole(text)


def _training_file(text: str) -> tuple[DataConfig | None, str]:
    file, part = (text, "all") if text.endswith(".toml") else text.rpartition(":")[::2]
    if not file.endswith(".toml"):
        return None, ""
    if part not in PARTS:
        raise RequestError(f"{text!r}: the part {part!r} is unknown; expected one of {', '.join(PARTS)}")
    config = load_config(RunConfig, Path(file)).data
    return config.model_copy(update={"random_crop": False, "random_flip": False}), part


def training_part(images: ImageSet, part: str) -> ImageSet:
    """One of :data:`PARTS` of a training file's images.

    Raises:
        DataError: if it is empty, because at most one image is held out.
    """
    if part == "all":
        return images
    config = images.config
    if not config.hold_out:
        raise DataError(
            f"{config.source}: nothing is held out, so there is no part '{part}'",
            hint="Set data.hold_out in the training file.",
        )
    training, held_out = split(images, config.hold_out)
    if part in ("train", "held-out"):
        return training if part == "train" else held_out
    first = np.zeros(len(held_out), bool)
    labels = np.zeros(len(held_out), np.int64) if held_out.labels is None else held_out.labels
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        order = stream_of(_HALVES_SEED, int(label)).permutation(rows)
        first[order[: (len(rows) + int(label) % 2) // 2]] = True  # odd labels: the judge rounds up
    chosen = np.flatnonzero(first if part == "judge" else ~first)
    if not len(chosen):
        raise DataError(f"{config.source}: the part '{part}' is empty", hint="Hold out more images.")
    return held_out.subset(chosen)


def _cropped(text: str, path: Path, size: int) -> ImageSource:
    grey = text == DIGITS or "idx3-ubyte" in path.name or (path.is_dir() and any(path.glob("*idx3-ubyte*")))
    settings = {"source": text, "image_size": size, "channels": 1 if grey else 3}
    return training_images(load_data(DataConfig.from_dict(settings, source="--size")))


def _whole(text: str) -> ImageSource:
    """Digits and IDX files, uncropped."""
    probe = DataConfig.from_dict({"source": text, "image_size": 8, "channels": 1}, source=text)
    images = read_source(probe).images
    assert isinstance(images, np.ndarray)  # folders are read elsewhere
    size = images.shape[1]
    if images.shape[1] != images.shape[2]:
        raise DataError(f"{text}: images of {images.shape[1]}x{images.shape[2]} pixels", hint="Give --size.")
    return training_images(load_data(probe.model_copy(update={"image_size": size})))


def training_images(images: ImageSet) -> ImageSource:
    """Images as training sees them, without augmentation."""
    config = images.config
    if config.channels not in (1, 3):
        raise DataError(f"{config.source}: {config.channels} channels; expected 1 or 3")
    unused = np.random.default_rng()  # no augmentation

    def read() -> Iterator[Pixels]:
        for first in range(0, len(images), _READ_ROWS):
            rows = range(first, min(first + _READ_ROWS, len(images)))
            yield images.stack(rows, [unused] * len(rows))

    shape = (config.image_size, config.image_size, config.channels)
    return ImageSource("training data", len(images), shape, read, images.labels)


def npz_images(archive: NpzFile) -> ImageSource:
    """``arr_0`` of an .npz file, and ``arr_1`` if it holds labels."""
    if "arr_0" not in archive:
        raise DataError(
            f"{archive.file} has no images: it has {archive.names}",
            hint="Images stand in arr_0, uint8 [N, H, W, C].",
        )
    member, labels = archive["arr_0"], None
    shape = _checked_shape(member)
    if "arr_1" in archive and archive["arr_1"].dtype.kind in "iu":
        labels = archive["arr_1"].read().astype(np.int64)
    if labels is not None and labels.shape != member.shape[:1]:
        raise DataError(f"{archive.file}: {member.shape[0]} images and labels of shape {list(labels.shape)}")
    return ImageSource("npz", member.shape[0], shape, partial(member.blocks, _READ_ROWS), labels)


def _run_images(folder: Path) -> ImageSource:
    """Images that a run of `admtrt sample` has drawn so far."""
    archives = [NpzFile.open(file) for file in sorted((folder / SHARDS).glob("*.npz"))]
    if not archives:
        raise DataError(
            f"{folder} is a run that has no finished samples yet", hint="Wait for its first batch."
        )
    members, labels = [], []
    for archive in archives:
        if "images" not in archive:
            raise DataError(f"{archive.file} is no shard of a run: it has {archive.names}")
        members.append(archive["images"])
        if "labels" in archive:
            labels.append(archive["labels"].read().astype(np.int64))
    shape = _checked_shape(members[0])
    for member in members:
        if _checked_shape(member) != shape:
            raise DataError(f"{member.file} holds images of {member.shape[1:]}; the first are {shape}")

    def read() -> Iterator[Pixels]:
        for member in members:
            yield from member.blocks(_READ_ROWS)

    return ImageSource(
        "run",
        sum(member.shape[0] for member in members),
        shape,
        read,
        np.concatenate(labels) if len(labels) == len(archives) else None,
        folder,
        _asked(folder),
    )


def drawn_images(folder: Path, shards: Shards, labels: Labels | None) -> ImageSource:
    """All samples of a run with a known request."""
    return ImageSource("run", len(shards), shards.image_shape, shards.images, labels, folder, len(shards))


def _folder_images(folder: Path, *, lossy: bool) -> ImageSource:
    """Image files below a folder, in the order of their paths."""
    files = _image_files(folder, lossy=lossy)
    shape = _form_of(files[0])
    config = DataConfig(source=str(folder), image_size=shape[0], channels=shape[2])

    def pixels(path: Path) -> Pixels:
        found = np.asarray(read_image(path, config))
        found = found if found.ndim == 3 else found[..., None]
        if found.shape != shape:
            raise DataError(
                f"{path} is {found.shape[0]}x{found.shape[1]} pixels; {files[0].name} is "
                f"{shape[0]}x{shape[1]}",
                hint="Samples have one size; for other data give --size, which crops as training does.",
            )
        return found

    def read() -> Iterator[Pixels]:
        for first in range(0, len(files), _READ_ROWS):
            yield np.stack(in_threads(pixels, files[first : first + _READ_ROWS]))

    prefixes = [re.match(r"(\d{1,9})_", path.name) for path in files]
    numbers = [int(found.group(1)) for found in prefixes if found]
    labels = np.array(numbers, np.int64) if len(numbers) == len(files) else None
    return ImageSource("folder", len(files), shape, read, labels)


def _image_files(folder: Path, *, lossy: bool) -> list[Path]:
    every = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in (*_LOSSLESS, *_LOSSY)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not every:
        raise DataError(f"no image in {folder} or below it", hint=f"Images end in {', '.join(_LOSSLESS)}.")
    coded = [path for path in every if path.suffix.lower() in _LOSSY]
    if coded and not lossy:
        raise DataError(
            f"{len(coded)} of {len(every)} images in {folder} are JPEG or WebP, {coded[0].name} for one",
            hint="Their artefacts move FID by more than most methods do (5.80 for 2.50 in one report): keep "
            "samples as PNG or npz, or pass --lossy.",
        )
    return every


def _form_of(file: Path) -> tuple[int, int, int]:
    """Shape of the first image; all images are converted to its channels."""
    try:
        with open_image(file) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{file} has pixels of mode {image.mode}, not 8 bits a channel")
            width, height = ImageOps.exif_transpose(image).size  # rotated like in read_image
            return height, width, 1 if image.mode in ("1", "L") else 3
    except DataError:
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise anything
        raise DataError(f"{file} cannot be read: it is no image, or damaged") from error


def _checked_shape(member: Member) -> tuple[int, int, int]:
    dtype, shape = member.dtype, member.shape
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not all(shape[1:]):
        raise DataError(
            f"{member.file}: {member.name} is {dtype} {list(shape)}; expected uint8 [N, H, W, C], C 1 or 3",
            hint="Write values of 0 to 255, images first and channels last.",
        )
    if not shape[0]:
        raise DataError(f"{member.file} holds no image")
    return shape[1], shape[2], shape[3]


def _asked(folder: Path) -> int | None:
    try:
        count = read_json(folder / REQUEST, LARGEST_REQUEST)["count"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return count if type(count) is int else None
