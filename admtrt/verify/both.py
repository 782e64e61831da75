"""Samples on both sides: the runtime's slots, and the paper form with the same noise."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Generic, TypeVar

from admtrt.runtime.noise import initial_noise, step_noise
from admtrt.runtime.slots import slots_for
from admtrt.schedule.table import sampling_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from admtrt.bundle import Manifest
    from admtrt.runtime.slots import Images, Slots
    from admtrt.schedule.sampler import SamplerConfig
    from admtrt.verify.inputs import Inputs
    from admtrt.verify.reference import Reference

Side = TypeVar("Side")


class Sides(Generic[Side]):
    """Samples of the runtime, and their states by a reference in float32 and, where needed, in float64.

    Args:
        slots: the runtime's samples at their start.
        states: yields a side's states, the start first.
        narrow: the side in float32.
        float64: returns the sides in float64; called only if needed.

    Attributes:
        slots: the runtime's samples, to be advanced.
    """

    def __init__(
        self,
        slots: Slots,
        states: Callable[[Side], Iterator[Images]],
        narrow: Side,
        float64: Callable[[], Sequence[Side]],
    ) -> None:
        self.slots = slots
        self._states = states
        self._float64_sides = float64
        self._narrow = _Walk(states(narrow))

    def expected(self, evaluations: int) -> Images:
        """PyTorch's state after ``evaluations`` evaluations. Call in ascending order."""
        return self._narrow.after(evaluations)

    def float64(self, evaluations: int) -> Callable[[], Sequence[Images]]:
        """The same for the float64 sides."""
        return lambda: [walk.after(evaluations) for walk in self._wide]

    @functools.cached_property
    def _wide(self) -> list[_Walk]:
        return [_Walk(self._states(side)) for side in self._float64_sides()]


class BothSides(Sides["Reference"]):
    """One sample per seed, on both sides.

    Args:
        manifest: the bundle's manifest.
        reference: PyTorch in float32.
        float64: returns the sides of :func:`~admtrt.verify.judged.float64_sides`; called only if needed.
        inputs: makes the networks' inputs.
        sampler: the sampler.
        seeds: seeds of the noise.
        shift: shift of the labels.
        start: number of evaluations of samples that start from random images (the last ones); None for all.

    Raises:
        RequestError: if no step is left from the start.
    """

    def __init__(
        self,
        manifest: Manifest,
        reference: Reference,
        float64: Callable[[], list[Reference]],
        inputs: Inputs,
        sampler: SamplerConfig,
        seeds: list[int],
        *,
        shift: int = 0,
        start: int | None = None,
    ) -> None:
        count, shape = len(seeds), inputs.image_shape
        schedule = sampling_schedule(manifest.diffusion, sampler, start)
        stage = manifest.network.low_res_size or 0
        x_T = initial_noise(seeds, shape, stage=stage)
        image = None if start is None else inputs.uniform(count, *shape)
        noise = functools.cache(lambda left: step_noise(seeds, [left] * count, shape, stage=stage))
        slots = slots_for(
            manifest.network,
            manifest.classifier,
            [schedule] * count,
            seeds,
            labels=inputs.labels(count, shift),
            low_res=inputs.low_res(count),
            guided=bool(sampler.scale),
            guides=manifest.guides,
            latents=x_T,
            images=image,
        )
        conditions = slots.conditions

        def states(side: Reference) -> Iterator[Images]:
            return side.trajectory(sampler, x_T, noise, conditions, start=start, image=image)

        super().__init__(slots, states, reference, float64)


class _Walk:
    """States computed lazily in order; only the last is kept."""

    def __init__(self, states: Iterator[Images]) -> None:
        self._states = enumerate(states)
        self._reached, self._state = next(self._states)

    def after(self, evaluations: int) -> Images:
        while self._reached < evaluations:
            self._reached, self._state = next(self._states)
        return self._state
