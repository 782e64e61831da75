"""Frames of a denoising: the predicted image after each step, as a GIF."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from admtrt.errors import RequestError
from admtrt.files import atomic_file
from admtrt.images import grid_of, to_uint8, usual_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from admtrt.runtime.drawn import Step

_MOST = 60
"""The most frames of a GIF. If there are more steps, that many are picked evenly."""
_FRAME, _LAST = 80, 2000  # milliseconds


class Frames:
    """A callback of :class:`~admtrt.runtime.pipeline.Pipeline` that keeps the predicted x_0 of steps.

    At most 60 of all steps are kept, the last among them. Looking at a step waits for the device: sampling on
    a GPU is slower with it.
    """

    def __init__(self) -> None:
        self._kept: dict[int, list[NDArray[np.uint8]]] = {}

    def __call__(self, step: Step) -> None:
        """Keep a step, if it is one of those that are kept."""
        left = step.total - step.index
        if left % -(-step.total // _MOST) == 0:
            self._kept.setdefault(step.index, []).append(to_uint8(step.x_0))

    @property
    def images(self) -> list[NDArray[np.uint8]]:
        """The samples at each step that was kept, uint8 [N, H, W, C]."""
        return [np.concatenate(self._kept[index]) for index in sorted(self._kept)]

    def save(self, path: str | Path, labels: Sequence[str] | None = None) -> None:
        """Write a GIF: the samples in a grid, a frame a step.

        Args:
            path: the file; replaced if it exists.
            labels: one text for each sample.

        Raises:
            RequestError: if no step was kept.
            OutputError: if the file cannot be written.
        """
        if not self._kept:
            raise RequestError(
                "there are no frames", hint="Give the object as the callback of a pipeline first."
            )
        images = self.images
        columns = usual_columns(len(images[0]), labels)
        grids = [grid_of(one, columns, labels).convert("RGB") for one in images]
        durations = [_FRAME] * (len(grids) - 1) + [_LAST]
        with atomic_file(Path(path)) as temporary:
            grids[0].save(
                temporary, format="GIF", save_all=True, append_images=grids[1:], duration=durations, loop=0
            )
