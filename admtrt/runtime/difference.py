"""Differences between samples and the images that they started from: anomaly maps."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.files import atomic_file
from admtrt.images import save_grid
from admtrt.runtime.bulk import GRID_LIMIT

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from admtrt.runtime.bulk import SmallImages

_BLOCK = 256  # images compared at once


def write_difference(drawn: SmallImages, given: NDArray[Any], directory: Path, *, grid: bool) -> list[Path]:
    """Write ``difference.npz`` (``arr_0`` float32 [N, H, W]: the mean over channels of |sample - image|).

    Args:
        drawn: the samples, uint8 [N, H, W, C].
        given: the images, uint8 [N, H, W, C] or float32 [N, C, H, W] in [-1, 1]; a single one is compared
            with all samples.
        directory: where to write.
        grid: whether to write ``difference.png`` with the first samples.

    Returns:
        The files. Differences are in uint8 levels, 0 to 255.

    Raises:
        OutputError: if the files cannot be written, or a shard is damaged.
    """
    path = directory / "difference.npz"
    shape = (len(drawn), *_difference(drawn[:1], given[:1]).shape[1:])
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with (
        atomic_file(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for start in range(0, len(drawn), _BLOCK):
            rows = slice(start, start + _BLOCK)
            of_these = given if len(given) == 1 else given[rows]
            member.write(_difference(drawn[rows], of_these).astype("<f4").tobytes())
    if not grid:
        return [path]
    count = min(len(drawn), GRID_LIMIT)
    shown = _difference(drawn[:count], given if len(given) == 1 else given[:count])
    picture = directory / "difference.png"
    save_grid(shown.round().astype(np.uint8)[..., None], picture, max(1, min(20, round(count**0.5))))
    return [path, picture]


def _difference(drawn: NDArray[np.uint8], given: NDArray[Any]) -> NDArray[np.float32]:
    levels = given if given.dtype == np.uint8 else ((given + 1) * 127.5).transpose(0, 2, 3, 1)
    difference: NDArray[np.float32] = np.abs(drawn.astype(np.float32) - levels).mean(axis=-1)
    return difference
