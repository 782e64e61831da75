"""Small images that an upsampler enlarges: whether they are what a bundle takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from admtrt.errors import RequestError

if TYPE_CHECKING:
    from admtrt.bundle import Bundle


class Sized(Protocol):
    """An array, or what is known of one that has not been read."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its values."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of images first."""


def check_conditioning(bundle: Bundle, images: Sized | None) -> None:
    """Refuse small images that are missing, not wanted or of other sizes than the bundle enlarges.

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
        found = ", ".join(["N", *map(str, images.shape[1:])][: len(images.shape)])  # N is not at fault
        raise RequestError(
            f"low_res is {images.dtype} [{found}]; expected uint8 [N, {size}, {size}, {channels}] "
            f"or finite float32 [N, {channels}, {size}, {size}]"
        )
