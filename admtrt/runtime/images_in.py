"""Read and check the images and masks that users give. Nothing is resized or converted silently."""

from __future__ import annotations

from contextlib import nullcontext
from io import BytesIO
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.errors import RequestError
from admtrt.images import MODES, from_uint8, to_uint8
from admtrt.npz import open_npz, reading_fault
from admtrt.reading import open_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from admtrt.npz import Header
    from admtrt.runtime.slots import Images, Labels

    Check = Callable[[Header], None]

_BEYOND = 1e-3  # rounding error allowed outside of [-1, 1]
_KNOWN = 128  # pixels of a mask picture from this value on are known
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
_SAVED = "Give the samples.npz of a run, or a file that np.savez wrote."
_AS_THEY_ARE = "Images are taken as they are: resize or convert them before."


class Upload(BytesIO):
    """A file that came with a request, and its name for messages."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self._name = name

    def __str__(self) -> str:
        return self._name


def checked_images(given: Any, event: tuple[int, ...], name: str) -> NDArray[Any]:
    """Check that images fit a network. Returns them unchanged: uint8 [N, H, W, C] or float32 [N, C, H, W].

    Args:
        given: the images.
        event: (C, H, W) of the network.
        name: what the images are, for messages.

    Raises:
        RequestError: for another type, shape or range, or if there are no images.
    """
    images = np.asarray(given)
    check_sizes(images, event, name)
    if images.dtype == np.float32:
        low, high = float(images.min()), float(images.max())
        if not (low >= -1 - _BEYOND and high <= 1 + _BEYOND):  # false for NaN
            raise RequestError(
                f"{name} holds values from {low:g} to {high:g}; expected -1 to 1",
                hint="Map 0 to 255 by x / 127.5 - 1, or give uint8.",
            )
    return images


def check_sizes(images: NDArray[Any] | Header, event: tuple[int, ...], name: str) -> None:
    """Like :func:`checked_images`, but check only type and shape, not the values.

    Raises:
        RequestError: for another type or shape, or if there are no images.
    """
    channels, height, width = event
    expected = {"uint8": (height, width, channels), "float32": event}
    if not images.shape or expected.get(str(images.dtype)) != images.shape[1:]:
        found = ", ".join(["N", *map(str, images.shape[1:])][: len(images.shape)])  # N may be any number
        raise RequestError(
            f"{name} is {images.dtype} [{found}]; expected uint8 [N, {height}, {width}, {channels}] or "
            f"float32 [N, {channels}, {height}, {width}] in [-1, 1]",
            hint=_AS_THEY_ARE,
        )
    if images.shape[0] == 0:
        raise RequestError(f"{name} holds no image")


def as_states(images: NDArray[Any]) -> Images:
    """Convert checked images to float32 [N, C, H, W] in [-1, 1]; ``to_uint8`` inverts this exactly."""
    if images.dtype == np.float32:
        return images
    states = np.ascontiguousarray(from_uint8(images.transpose(0, 3, 1, 2)))
    cut = to_uint8(states).transpose(0, 3, 1, 2) < images.transpose(0, 3, 1, 2)
    return np.where(cut, np.nextafter(states, np.float32(2)), states)


def checked_mask(given: Any, event: tuple[int, ...]) -> NDArray[np.bool_]:
    """Check masks, one for all samples or one each. Returns bool [N, 1, H, W]: True means known.

    Args:
        given: bool, or 0 and 1 of any type, [H, W], [N, H, W] or [N, 1, H, W].
        event: (C, H, W) of the network.

    Raises:
        RequestError: for another shape, other values, or a mask in which all or no pixels are known.
    """
    mask, size = np.asarray(given), event[1:]
    _check_mask_sizes(mask, size)
    if mask.dtype.kind not in "buif" or not np.isin(mask, (0, 1)).all():
        raise RequestError(
            f"the mask is {mask.dtype} with values other than 0 and 1",
            hint="Give 1 or True where a pixel is known, 0 elsewhere; soft masks are not possible.",
        )
    checked = mask.astype(bool).reshape(-1, 1, *size)
    if len(checked) == 0:
        raise RequestError("the mask file holds no mask")
    for index, one in enumerate(checked):
        if one.all() or not one.any():
            which = f"mask {index}" if len(checked) > 1 else "the mask"
            raise RequestError(
                f"{which} knows {'every pixel' if one.all() else 'no pixel'}; nothing is left to "
                f"{'draw' if one.all() else 'keep'}",
                hint="White (1) is known and kept, black (0) is drawn.",
            )
    return checked


def _check_mask_sizes(mask: NDArray[Any] | Header, size: tuple[int, ...]) -> None:
    shape = mask.shape
    if len(shape) == 4 and shape[1] == 1:
        shape = (shape[0], *shape[2:])
    if shape[-2:] != size or len(shape) not in (2, 3):
        raise RequestError(
            f"the mask is {mask.dtype} {list(mask.shape)}; expected [{size[0]}, {size[1]}], or one for each "
            f"sample: [N, {size[0]}, {size[1]}]",
            hint=_AS_THEY_ARE,
        )


def read_images(path: Path, event: tuple[int, ...], name: str) -> tuple[NDArray[Any], Labels | None]:
    """Read images from a file or a folder, and labels if the file has them.

    Args:
        path: .npz with ``arr_0`` (and labels int64 [N] as ``arr_1``), an image file, or a folder of them,
            taken in the order of their names.
        event: (C, H, W) of the network.
        name: the option, for messages.

    Raises:
        RequestError: if it cannot be read or the images do not fit.
    """
    shown = f"{name} {path}"
    if path.is_dir():
        files = sorted(
            file
            for file in path.iterdir()
            if file.suffix.lower() in PICTURES and not file.name.startswith(".")
        )
        if not files:
            raise RequestError(f"{shown} holds no image", hint=f"Images end in {', '.join(PICTURES)}.")
        return np.stack([read_picture(file, event) for file in files]), None
    if path.suffix.lower() in PICTURES:
        return read_picture(path, event)[None], None

    def check_images(header: Header) -> None:
        check_sizes(header, event, shown)

    def check_labels(header: Header) -> None:
        if header.dtype.kind not in "iu" or len(header.shape) != 1:
            raise RequestError(f"{path}: arr_1 is {header}; expected one label for each image, whole numbers")

    arrays = read_npz(path, name, {"arr_0": check_images}, {"arr_1": check_labels})
    images, labels = checked_images(arrays["arr_0"], event, shown), arrays.get("arr_1")
    if labels is not None and len(labels) != len(images):
        raise RequestError(f"{path} has {len(labels)} labels in arr_1; expected {len(images)}")
    return images, None if labels is None else labels.astype(np.int64)


def read_mask(path: Path, event: tuple[int, ...]) -> NDArray[np.bool_]:
    """Read a mask from an image file (known from 128 on) or from .npz (``arr_0``); see :func:`checked_mask`.

    Raises:
        RequestError: if it cannot be read or does not fit the images.
    """
    if path.suffix.lower() not in PICTURES:
        checks = {"arr_0": lambda header: _check_mask_sizes(header, event[1:])}
        return checked_mask(read_npz(path, "--mask", checks)["arr_0"], event)
    return read_mask_picture(path, event)


def read_mask_picture(path: Path | Upload, event: tuple[int, ...]) -> NDArray[np.bool_]:
    """Like :func:`read_mask`, for image files only."""
    opened = _opened(path, event)
    if opened.has_transparency_data:
        raise RequestError(
            f"the mask {path} has transparency, and what that means is not known",
            hint="Save it without: white is known, black is drawn.",
        )
    return checked_mask(np.asarray(opened.convert("L")) >= _KNOWN, event)


def read_npz(
    path: Path | Upload,
    name: str,
    needed: Mapping[str, Check],
    known: Mapping[str, Check] = MappingProxyType({}),
    *,
    whole: Callable[[Mapping[str, Header]], None] = lambda _: None,
) -> dict[str, NDArray[Any]]:
    """Read arrays of an .npz file by name. Each header is checked before the array is decompressed.

    Args:
        path: the file, or an upload.
        name: the option, for messages; may be empty.
        needed, known: the required and the optional arrays, each with its check.
        whole: checks the arrays together after each has passed its own check.

    Raises:
        RequestError: if it cannot be read, lacks an array, or a check fails.
    """
    shown = f"{name} {path}".strip()
    try:
        with open_npz(path) as archive:
            missing = [one for one in needed if one not in archive.names]
            if missing:
                held = ", ".join(archive.names) or "nothing"
                raise RequestError(f"{shown} has no {', '.join(missing)}; it has {held}", hint=_SAVED)
            found = {one: check for one, check in (*needed.items(), *known.items()) if one in archive.names}
            for one, check in found.items():
                check(archive.header(one))
            whole({one: archive.header(one) for one in found})
            return {one: archive.read(one) for one in found}
    except RequestError:
        raise
    except Exception as error:  # arbitrary bytes can raise anything
        raise RequestError(
            f"cannot read {shown} as .npz with {', '.join(needed)}: {reading_fault(error)}", hint=_SAVED
        ) from None


def read_picture(path: Path | Upload, event: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read a picture with the network's size and channels, uint8 [H, W, C]."""
    opened, mode = _opened(path, event), MODES[event[0]]
    plain = {"1": "L", "P": "RGB"}.get(opened.mode, opened.mode)  # other encodings of the same mode
    if plain != mode or (opened.has_transparency_data and event[0] in (1, 3)):
        raise RequestError(
            f"{path} has pixels of mode {opened.mode}; the network's are {mode} ({event[0]} channels)",
            hint=_AS_THEY_ARE,
        )
    return np.asarray(opened.convert(mode), dtype=np.uint8).reshape(*event[1:], event[0])


def _opened(path: Path | Upload, event: tuple[int, ...]) -> Any:
    """Open and decode a picture after checking its size."""
    from PIL import Image

    try:
        given = nullcontext(path) if isinstance(path, Upload) else open_regular(path)
        with given as opened, Image.open(opened, formats=_FORMATS) as picture:
            size = picture.size
            if size == (event[2], event[1]):
                picture.load()
                return picture.copy()
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is damaged or no image"
        raise RequestError(f"cannot read {path}: {reason}") from None
    raise RequestError(
        f"{path} has {size[0]}x{size[1]} pixels; expected {event[2]}x{event[1]}", hint=_AS_THEY_ARE
    )
