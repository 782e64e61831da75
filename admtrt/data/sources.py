"""Reading training images: the kind of data at a path, their labels, and which files are usable."""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from admtrt.brief import listed
from admtrt.errors import DataError, MissingDependencyError
from admtrt.images import MODES
from admtrt.npz import open_npz
from admtrt.reading import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from admtrt.npz import Archive
    from admtrt.run_config import DataConfig

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]

DIGITS = "digits"
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats, by Pillow's names, that it may decode. For another format it would run Ghostscript."""
MOST_PIXELS = 2**26
"""Largest number of pixels of a training image; Pillow warns of a decompression bomb at a higher number."""

_IDX_IMAGES = re.compile(r"(?P<stem>.*)images(?P<mark>[-.])idx3-ubyte(\.gz)?")
_IDX_UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b"\x1f\x8b"
_TOO_DEEP = "not 8 bits a channel"
_BLOCK = 2**20  # bytes
_MOST_CLASSES = 1_000_000  # larger labels cannot be indices of classes


class Skipped(NamedTuple):
    """A file that was left out, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Source:
    """Images that were read.

    Attributes:
        images: uint8 [N, H, W, C] in memory, or N files that were all decoded once without an error.
        labels: int64 [N], indices of ``class_names``; None without labels.
        class_names: for folders, sorted as text; for other kinds, all numbers from 0; empty without labels.
        numbered: True if the data label classes by number, False if by name.
        skipped: the bad files left out.
    """

    images: Pixels | tuple[Path, ...]
    labels: Labels | None = None
    class_names: tuple[str, ...] = ()
    numbered: bool = False
    skipped: tuple[Skipped, ...] = ()


def read_source(config: DataConfig) -> Source:
    """Read the data at ``config.source``; with ``kind`` ``auto``, detect what kind of data it is.

    Raises:
        DataError: if it is missing, empty, damaged, of an unknown kind, not labelled as ``label_from`` asks,
            or of another size than ``image_size`` while ``resize`` is off.
        MissingDependencyError: for the digits if scikit-learn is not installed.
    """
    path = Path(config.source).expanduser()
    try:
        kind = _kind_of(config, path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {_reason(error)}") from None
    if kind == "folder":
        return _read_folder(path, config)
    if config.label_from in ("folder", "prefix"):
        raise DataError(
            f"label_from '{config.label_from}' applies to folders of images; {config.source} is {kind}",
            hint="Leave data.label_from at 'auto', or set it to 'none' to drop the labels.",
        )
    pixels: Pixels
    numbers: Labels | None
    if kind == DIGITS:
        pixels, numbers = _read_digits()
    else:
        pixels, numbers = _read_idx(path) if kind == "idx" else _read_npz(path)
    count, height, width, _ = pixels.shape
    if not pixels.size:
        raise DataError(f"{config.source} holds no image: {count} of {height}x{width} pixels")
    if not config.resize and (height, width) != (config.image_size, config.image_size):
        raise DataError(
            f"the images of {config.source} are {height}x{width} pixels, image_size is {config.image_size}, "
            "and resize is off",
            hint=f"Set data.resize = true, or data.image_size = {height} if they are square.",
        )
    if numbers is None or config.label_from == "none":
        return Source(pixels)
    if numbers.shape != (count,):
        raise DataError(f"{config.source} holds {count} images but labels of shape {list(numbers.shape)}")
    if numbers.min() < 0 or numbers.max() >= _MOST_CLASSES:
        raise DataError(
            f"{config.source} has the label {numbers.min() if numbers.min() < 0 else numbers.max()}; "
            f"labels are the numbers of classes, 0 to {_MOST_CLASSES - 1} at most",
            hint="Leave unlabelled images out, or set data.label_from = 'none' to drop the labels.",
        )
    return Source(pixels, numbers, tuple(map(str, range(numbers.max() + 1))), numbered=True)


def _kind_of(config: DataConfig, path: Path) -> str:
    kind = config.kind
    if config.source == DIGITS and kind in ("auto", DIGITS):
        return DIGITS
    if kind == DIGITS:
        raise DataError(
            f"kind is 'digits' but source is {config.source!r}",
            hint='Set data.source = "digits", or another kind.',
        )
    if not path.exists():
        raise DataError(
            f"{path} does not exist",
            hint=f"Set data.source to a folder, an IDX file, an .npz file or '{DIGITS}'.",
        )
    if kind == "auto":
        if path.is_dir():
            kind = "idx" if _idx_images_in(path) else "folder"
        elif path.suffix == ".npz":
            kind = "npz"
        elif _IDX_IMAGES.fullmatch(path.name):
            kind = "idx"
        else:
            raise DataError(
                f"cannot tell what kind of data {path} is",
                hint="Set data.kind to 'idx' or 'npz', or name a folder.",
            )
    if kind == "folder" and not path.is_dir():
        raise DataError(f"{path} is a file; kind 'folder' expects a folder of images")
    if kind == "npz" and path.is_dir():
        raise DataError(f"{path} is a folder; kind 'npz' expects a file")
    return kind


def _read_digits() -> tuple[Pixels, Labels]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingDependencyError("scikit-learn", extra="train", purpose="reading the digits") from None
    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None], digits.target.astype(np.int64)


# --- folders of images -------------------------------------------------------------------------------------


def with_channels(image: Image.Image, config: DataConfig) -> Image.Image:
    """An image in the configured channels, with the configured background behind transparent pixels."""
    mode = MODES[config.channels]
    if not image.has_transparency_data:
        return image.convert(mode)
    image = image.convert("RGBA")  # Pillow warns about direct conversions from a palette
    if config.background is not None and "A" not in mode:
        behind = Image.new("RGBA", image.size, (*[config.background] * 3, 255))
        image = Image.alpha_composite(behind, image)
    return image.convert(mode)


def read_image(path: Path, config: DataConfig) -> Image.Image:
    """Decode a file, rotate it by its EXIF data and convert its channels; of an animation, the first frame.

    Raises:
        DataError: naming the file, if that fails.
    """
    try:
        with open_image(path) as image:
            return with_channels(_upright(image, config), config)
    except Exception as error:  # for damaged files Pillow's decoders raise almost any exception
        raise DataError(f"{path} can no longer be read: {_reason(error)}") from None


def _upright(image: Image.Image, config: DataConfig) -> Image.Image:
    return ImageOps.exif_transpose(image) if config.exif_rotation else image


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image without decoding it: a regular file in an allowed format, at most MOST_PIXELS pixels."""
    with open_regular(path) as opened, Image.open(opened, formats=_FORMATS) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels, more than {MOST_PIXELS} in all")
        yield image


def _fault_of(path: Path, config: DataConfig) -> str | None:
    """The fault of an unusable file, or None. Decodes the whole file, to detect truncated JPEGs."""
    try:
        with open_image(path) as image:
            size = config.image_size
            if not config.resize and image.size != (size, size):
                return f"{image.width}x{image.height} pixels, not {size}x{size}"
            if image.mode.startswith(("I", "F")):
                return f"pixels of mode {image.mode}, {_TOO_DEEP}"
            image.draft(None, (1, 1))  # a JPEG is read to its end, without most of the arithmetic
            _upright(image, config).load()
    except Exception as error:  # as in read_image
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _read_folder(root: Path, config: DataConfig) -> Source:
    files = _image_files(root)
    with ThreadPool() as pool:  # Pillow decodes outside the interpreter's lock
        faults = pool.starmap(_fault_of, [(file, config) for file in files])
    skipped = tuple(
        Skipped(file, fault) for file, fault in zip(files, faults, strict=True) if fault is not None
    )
    usable = tuple(file for file, fault in zip(files, faults, strict=True) if fault is None)
    if skipped and (config.on_bad_file == "refuse" or not usable):
        raise DataError(
            f"{len(skipped)} of {len(files)} images in {root} cannot be used: "
            + listed(f"{file.relative_to(root)} ({reason})" for file, reason in skipped),
            hint=(
                "Convert them to 8 bits a channel, or remove them"
                if all(reason.endswith(_TOO_DEEP) for _, reason in skipped)
                else "Repair or remove them"
            )
            + (', or set data.on_bad_file = "skip".' if usable else "."),
        )
    names = _class_of_each(root, usable, config.label_from)
    if names is None:
        return Source(usable, skipped=skipped)
    class_names, labels = np.unique(names, return_inverse=True)
    return Source(usable, labels.astype(np.int64), tuple(map(str, class_names)), skipped=skipped)


def _image_files(root: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from None

    found, others = [], 0
    seen = {_inode(root)}
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        below = {name: _inode(Path(folder, name)) for name in subfolders if not name.startswith(".")}
        subfolders[:] = [name for name, inode in below.items() if inode not in seen]  # links may lead back
        seen.update(below.values())
        images = [
            name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
        found += [Path(folder, name) for name in images]
        others += len(names) - len(images)
    if not found:
        content = f"only {others} other files" if others else "empty"
        raise DataError(
            f"no image in {root} or below it ({content})",
            hint=f"Images end in {', '.join(IMAGE_SUFFIXES)}. For an .npz file give its own path.",
        )
    return sorted(found)


def _inode(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _class_of_each(root: Path, files: Sequence[Path], label_from: str) -> list[str] | None:
    """The class name of each file; None for ``none``, or if ``auto`` finds no rule that fits every file."""
    loose = [file.name for file in files if file.parent == root]
    unmarked = [file.name for file in files if "_" not in file.name]
    if label_from == "folder" and loose:
        raise DataError(
            f"label_from is 'folder', but {len(loose)} images lie directly in {root}: {listed(loose)}",
            hint="Move each into the subfolder of its class.",
        )
    if label_from == "prefix" and unmarked:
        raise DataError(
            f"label_from is 'prefix', but {len(unmarked)} names in {root} hold no '_': {listed(unmarked)}",
            hint="Name the files <class>_<anything>.",
        )
    if label_from == "none":
        return None
    if label_from != "prefix" and not loose:
        return [file.relative_to(root).parts[0] for file in files]
    return None if unmarked else [file.name.split("_")[0] for file in files]


# --- IDX files ---------------------------------------------------------------------------------------------


def _idx_images_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*idx3-ubyte*") if _IDX_IMAGES.fullmatch(file.name))


def _read_idx(path: Path) -> tuple[Pixels, Labels | None]:
    if path.is_dir():
        path = _chosen_idx(path)
    images = _idx_array(path, dimensions=3)[..., None]
    if "images" in path.name:
        name = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
        for labels in (path.with_name(name), path.with_name(f"{name}.gz")):
            if labels.is_file():
                return images, _idx_array(labels, dimensions=1).astype(np.int64)
    return images, None


def _chosen_idx(folder: Path) -> Path:
    """The folder's only file of images, or else the only one for training."""
    files = _idx_images_in(folder)
    training = [file for file in files if "train" in file.name] if len(files) > 1 else files
    if len(training) != 1:
        held = f"holds {listed(file.name for file in files)}" if files else "holds no file of images"
        raise DataError(
            f"{folder} {held}; expected one like train-images-idx3-ubyte or train-images-idx3-ubyte.gz",
            hint="Set data.source to the file of images; its labels are found beside it.",
        )
    return training[0]


def _idx_array(path: Path, *, dimensions: int) -> Pixels:
    """Decode an IDX file of unsigned bytes: magic 00 00 08 <dimensions>, big-endian uint32 sizes, data."""
    body = 4 + 4 * dimensions
    try:
        with open_regular(path) as opened:
            packed = opened.peek(2)[:2] == _GZIP_MAGIC
            source = gzip.GzipFile(fileobj=opened) if packed else opened
            header = source.read(body)
            shape = struct.unpack(f">{dimensions}I", header[4:].ljust(4 * dimensions, b"\0"))
            expected = math.prod(shape)
            data = bytearray()
            # In blocks, until the data end: a header may promise more than fits into memory.
            while len(data) <= expected and (block := source.read(_BLOCK)):
                data += block
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {_reason(error)}") from None
    magic = bytes([0, 0, _IDX_UNSIGNED_BYTE, dimensions])
    if header[:4] != magic:
        raise DataError(
            f"{path} starts with the bytes '{header[:4].hex(' ')}'; an IDX file of {dimensions} dimensions "
            f"of unsigned bytes starts with '{magic.hex(' ')}'"
        )
    if len(header) < body:
        raise DataError(f"{path} ends within its header: {len(header)} of {body} bytes")
    if len(data) != expected:
        held = "more" if len(data) > expected else len(data)
        raise DataError(
            f"{path} is {'truncated' if len(data) < expected else 'too long'}: its header promises "
            f"{' x '.join(map(str, shape))} bytes of data, it holds {held}"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


# --- .npz archives -----------------------------------------------------------------------------------------


def _read_npz(path: Path) -> tuple[Pixels, Labels | None]:
    hint = (
        "Expected: arr_0 uint8 [N, H, W, C] with 1 to 4 channels and, optionally, arr_1 with N whole numbers."
    )
    try:
        with open_npz(path) as archive:
            fault = _npz_fault(path, archive)
            images = None if fault else archive.read("arr_0")
            labels = archive.read("arr_1") if not fault and "arr_1" in archive.names else None
    except zipfile.BadZipFile:
        raise DataError(f"{path} is no .npz archive, or only the start of one", hint=hint) from None
    except Exception as error:  # for damaged archives the reader raises almost any exception
        raise DataError(f"cannot read {path}: {_reason(error)}", hint=hint) from None
    if images is None:
        raise DataError(fault, hint=hint)
    return images, None if labels is None else cast("Labels", labels.astype(np.int64))


def _npz_fault(path: Path, archive: Archive) -> str:
    """The fault in the images and labels of an archive, from their headers alone; empty if there is none."""
    if "arr_0" not in archive.names:
        return f"{path} holds no arr_0 (it holds: {', '.join(archive.names) or 'nothing'})"
    images = archive.header("arr_0")
    if images.dtype != np.uint8 or len(images.shape) != 4 or not 1 <= images.shape[3] <= 4:
        return f"arr_0 of {path} is {images}"
    if "arr_1" in archive.names and archive.header("arr_1").dtype.kind not in "iu":
        return f"arr_1 of {path} is {archive.header('arr_1')}"
    return ""
