"""Small images that an upsampler enlarges: read them from files and check them against a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from admtrt.errors import RequestError
from admtrt.runtime.images_in import read_npz

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from admtrt.bundle import Bundle
    from admtrt.npz import Header
    from admtrt.runtime.slots import Labels


class Sized(Protocol):
    """An array, or the dtype and shape of one that has not been read."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the values."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, the number of images first."""


def check_conditioning(bundle: Bundle, images: Sized | None) -> None:
    """Refuse small images that are missing, not wanted, or not of the size that the bundle enlarges.

    Raises:
        RequestError: naming what differs.
    """
    size, channels = bundle.manifest.network.low_res_size, bundle.manifest.network.in_channels
    if images is None and size is not None:
        raise RequestError(
            f"{bundle.path} is an upsampler and needs low_res images",
            hint="Give them (--low-res FILE.npz), or draw the small images in one go with --upsample.",
        )
    if images is None:
        return
    if size is None:
        raise RequestError(
            f"{bundle.path} is no upsampler, but low_res images were given", hint="Leave them out."
        )
    expected = {np.dtype(np.uint8): (size, size, channels), np.dtype(np.float32): (channels, size, size)}
    if expected.get(images.dtype) != images.shape[1:]:
        found = ", ".join(["N", *map(str, images.shape[1:])][: len(images.shape)])  # N may be any number
        raise RequestError(
            f"low_res is {images.dtype} [{found}]; expected uint8 [N, {size}, {size}, {channels}] "
            f"or finite float32 [N, {channels}, {size}, {size}]"
        )


@dataclass(frozen=True, eq=False)
class SmallImages:
    """Images for an upsampler: uint8 [N, H, W, C], and their labels, int64 [N], where the file has them."""

    images: NDArray[np.uint8]
    labels: Labels | None

    def __len__(self) -> int:
        return len(self.images)


def read_small_images(path: Path, bundle: Bundle, *, most: int) -> SmallImages:
    """Read ``arr_0`` and ``arr_1`` of an .npz file and check their sizes against the bundle.

    Args:
        path: the file.
        bundle: the upsampler's bundle.
        most: the largest number of images allowed.

    Raises:
        RequestError: if the file cannot be read or holds something else.
    """

    def check_images(found: Header) -> None:
        if found.dtype != np.uint8 or len(found.shape) != 4:
            raise RequestError(f"{path}: arr_0 is {found}; expected uint8 [N, H, W, C]")

    def check_both(found: Mapping[str, Header]) -> None:
        images, labels = found["arr_0"], found.get("arr_1")
        count = images.shape[0]
        if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (count,)):
            raise RequestError(f"{path}: arr_1 is {labels}; expected {count} labels, whole numbers")
        check_conditioning(bundle, images)
        if not 1 <= count <= most:
            raise RequestError(f"{path} holds {count} images; expected 1 to {most}")

    arrays = read_npz(path, "", {"arr_0": check_images}, {"arr_1": lambda _: None}, whole=check_both)
    numbers = arrays["arr_1"].astype(np.int64) if "arr_1" in arrays else None
    if numbers is not None and numbers.size and numbers.min() < 0:
        raise RequestError(
            f"{path}: arr_1 has the label {numbers.min()}; labels are the numbers of classes",
            hint="Leave arr_1 out where nothing is labelled.",
        )
    return SmallImages(arrays["arr_0"], numbers)
