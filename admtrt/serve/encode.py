"""Encode images for clients: PNG, npz, and base64 for JSON."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.images import to_pillow, to_uint8

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from admtrt.runtime.slots import Images

_FAST = 1  # PNG compression level: the images are small and sent once


def base64_png(pixels: NDArray[np.uint8]) -> str:
    """Encode an image, uint8 [H, W, C], as base64 PNG."""
    written = io.BytesIO()
    to_pillow(pixels).save(written, "PNG", compress_level=_FAST)
    return base64.b64encode(written.getvalue()).decode("ascii")


def base64_sample(x: Images) -> str:
    """Encode a sample, float32 [C, H, W] in [-1, 1], as base64 PNG."""
    return base64_png(to_uint8(x[None])[0])


def npz(images: Sequence[Images], labels: Sequence[int] | None) -> bytes:
    """``arr_0`` uint8 [N, H, W, C] and ``arr_1`` int64 [N], as ``admtrt sample`` writes them."""
    written = io.BytesIO()
    arrays: dict[str, NDArray[Any]] = {"arr_0": to_uint8(np.stack(images))}
    if labels is not None:
        arrays["arr_1"] = np.array(labels, np.int64)
    np.savez(written, **arrays)  # type: ignore[arg-type]
    return written.getvalue()
