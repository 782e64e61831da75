"""Drawing with a pipeline: checked requests, the state at each step, the samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from admtrt.images import to_uint8

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from admtrt.runtime.image_inputs import ImageInputs
    from admtrt.runtime.sampler import HeldSlots
    from admtrt.runtime.slots import Images, Labels, Slots
    from admtrt.schedule.sampler import SamplerConfig


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples that were drawn.

    Attributes:
        x: float32 [N, C, H, W], unclipped x_0 of the last step.
        labels: int64 [N], or None where no class was asked for.
        seeds: one for each sample; the same seed gives the same image in any batch.
    """

    x: Images
    labels: Labels | None
    seeds: tuple[int, ...]

    @property
    def images(self) -> NDArray[np.uint8]:
        """uint8 [N, H, W, C]."""
        return to_uint8(self.x)


@dataclass(frozen=True, eq=False)
class Step:
    """State that a callback sees after each evaluation of a batch.

    Attributes:
        index: evaluations done, from 1 to ``total``.
        total: steps in all.
        first: position of the batch's first sample among all samples.
        count: samples of the batch.
        timestep: of the base process, at which the evaluation was, fractional between two; None where the
            process has none.
        state: gives ``x`` and ``x_0``; see there.
    """

    index: int
    total: int
    first: int
    count: int
    timestep: float | None
    state: Callable[[], tuple[Images, Images]] = field(repr=False)

    @property
    def x(self) -> Images:
        """x_t after the step, float32 [N, C, H, W]; the first look waits for the device.

        Raises:
            RuntimeError: if the first look at the images comes after a later step.
        """
        return self._images[0]

    @property
    def x_0(self) -> Images:
        """The predicted x_0, otherwise as ``x``."""
        return self._images[1]

    @cached_property
    def _images(self) -> tuple[Images, Images]:
        return self.state()


@dataclass(frozen=True, eq=False)
class Given:
    """A checked request, rows for its samples; :meth:`Pipeline.check` makes it."""

    sampler: SamplerConfig
    labels: Labels | None
    seeds: list[int]
    low_res: Images | None
    inputs: ImageInputs

    def __len__(self) -> int:
        return len(self.seeds)

    def part(self, rows: slice) -> Given:
        """Some of the samples."""
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
