"""Drawing with a pipeline: checked requests, the state at each step, the samples."""

from __future__ import annotations

import io
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from admtrt.files import atomic_file
from admtrt.images import grid_of, save_grid, to_pillow, to_uint8, usual_columns
from admtrt.runtime.request import names_of, some_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from PIL import Image

    from admtrt.runtime.image_inputs import ImageInputs
    from admtrt.runtime.sampler import HeldSlots
    from admtrt.runtime.slots import Images, Labels, Slots
    from admtrt.schedule.sampler import SamplerConfig

_SHOWN = 100  # samples shown in a notebook


@dataclass(frozen=True, eq=False)
class Samples:
    """The result of sampling.

    Attributes:
        x: float32 [N, C, H, W], unclipped x_0 of the last step.
        labels: int64 [N], or None if no classes were requested.
        seeds: one for each sample; the same seed gives the same image in any batch.
        class_names: names of all classes, if the bundle has names.
    """

    x: Images
    labels: Labels | None
    seeds: tuple[int, ...]
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        count, *event = self.x.shape
        names = self.names
        asked = "" if names is None else f", classes {some_names(names)}"
        return f"Samples({count} of {'x'.join(map(str, event))}{asked}, seeds {some_names(self.seeds)})"

    @property
    def images(self) -> NDArray[np.uint8]:
        """uint8 [N, H, W, C]."""
        return to_uint8(self.x)

    @property
    def names(self) -> list[str] | None:
        """The class name of each sample, or its number if there are no names; None without classes."""
        return None if self.labels is None else names_of(self.labels, self.class_names)

    @property
    def pil(self) -> list[Image.Image]:
        """The samples as Pillow images."""
        return [to_pillow(image) for image in self.images]

    def grid(self, columns: int | None = None) -> Image.Image:
        """The samples in one Pillow image, ``columns`` to a row, each labelled with its class."""
        return grid_of(self.images, columns or usual_columns(len(self), self.names), self.names)

    def save(self, place: str | Path) -> list[Path]:
        """Write the samples: to a path that ends in .png as a grid, to a folder as one PNG per sample.

        Files in a folder are named as ``admtrt sample --format png`` names them, ``CLASS_INDEX.png``.

        Returns:
            The files.

        Raises:
            OutputError: if they cannot be written.
        """
        place = Path(place)
        if place.suffix.lower() == ".png":
            save_grid(self.images, place, usual_columns(len(self), self.names), self.names)
            return [place]
        files = []
        for index, image in enumerate(self.pil):
            prefix = "" if self.labels is None else f"{self.labels[index]}_"
            files.append(place / f"{prefix}{index:06d}.png")
            with atomic_file(files[-1]) as temporary:
                image.save(temporary, format="PNG")
        return files

    def _repr_png_(self) -> bytes:
        """The grid of the first 100 samples, for notebooks."""
        shown = slice(None, _SHOWN)
        images, names = self.images[shown], None if self.names is None else self.names[shown]
        grid = grid_of(images, usual_columns(len(images), names), names)
        written = io.BytesIO()
        grid.save(written, format="PNG")
        return written.getvalue()


@dataclass(frozen=True, eq=False)
class Step:
    """Argument of a callback after each evaluation of a batch.

    Attributes:
        index: evaluations done, from 1 to ``total``.
        total: number of evaluations.
        first: position of the batch's first sample among all samples.
        count: samples of the batch.
        timestep: timestep of the evaluation in the base process, which may be fractional; None if the process
            has no timesteps.
        state: computes ``x`` and ``x_0``.
    """

    index: int
    total: int
    first: int
    count: int
    timestep: float | None
    state: Callable[[], tuple[Images, Images]] = field(repr=False)

    @property
    def x(self) -> Images:
        """x_t after the step, float32 [N, C, H, W]. The first access waits for the device.

        Raises:
            RuntimeError: if the first access comes after a later step.
        """
        return self._images[0]

    @property
    def x_0(self) -> Images:
        """The predicted x_0; otherwise like ``x``."""
        return self._images[1]

    @cached_property
    def _images(self) -> tuple[Images, Images]:
        return self.state()


@dataclass(frozen=True, eq=False)
class Given:
    """A checked request, made by :meth:`Pipeline.check`, with one row per sample."""

    sampler: SamplerConfig
    labels: Labels | None
    seeds: list[int]
    low_res: Images | None
    inputs: ImageInputs

    def __len__(self) -> int:
        return len(self.seeds)

    def part(self, rows: slice) -> Given:
        """The part of the request for some samples."""
        return Given(
            sampler=self.sampler,
            labels=None if self.labels is None else self.labels[rows],
            seeds=self.seeds[rows],
            low_res=None if self.low_res is None else self.low_res[rows],
            inputs=self.inputs.part(rows),
        )


def state_after(index: int, slots: Slots, held: HeldSlots) -> tuple[Images, Images]:
    """``x`` and ``x_0`` after a step, for :class:`Step`.

    Raises:
        RuntimeError: if a later step was taken.
    """
    if slots.position[0] != index:
        raise RuntimeError(f"the images after step {index} are gone; look at them during the callback")
    held.read()
    return slots.x, slots.x_0


@contextmanager
def with_bar(callback: Callable[[Step], None] | None, total: int) -> Iterator[Callable[[Step], None]]:
    """Show a progress bar on the terminal before calling the caller's callback.

    Args:
        callback: the caller's own.
        total: sum of the steps of all samples.
    """
    from admtrt.console import progress_bar

    with progress_bar("sampling", total) as progress:

        def after_step(step: Step) -> None:
            progress(step.count, f"step {step.index}/{step.total}")
            if callback is not None:
                callback(step)

        yield after_step
