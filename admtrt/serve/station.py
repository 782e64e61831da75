"""A station: the rows of one network, which take every step together."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from admtrt.errors import EngineError
from admtrt.runtime.sampler import ResidentDenoiser, advance, hold
from admtrt.runtime.slots import Slots
from admtrt.serve.costs import Costs, MeasuredDenoiser

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admtrt.runtime.pipeline import Pipeline
    from admtrt.runtime.sampler import HeldSlots
    from admtrt.runtime.slots import Images
    from admtrt.serve.flight import Row
    from admtrt.serve.sizes import Sizes


class Station:
    """The rows of one stage.

    As long as the rows do not change, their joined slots are kept, on the device if the backend supports it.
    Rows that leave take all their state along.

    Args:
        stage: number of the stage.
        pipeline: the stage's pipeline.
        sizes: the prepared batch sizes.
        costs: costs of its graphs.

    Attributes:
        rows: the current rows, without padding.
        size: the batch size.
    """

    def __init__(self, stage: int, pipeline: Pipeline, sizes: Sizes, costs: Costs) -> None:
        self.stage = stage
        self.sizes = sizes
        self.costs = costs
        self.rows: list[Row] = []
        self.size = 0
        denoiser = pipeline.denoiser
        self.measured = (
            None if isinstance(denoiser, ResidentDenoiser) else MeasuredDenoiser(denoiser, costs, sizes)
        )
        self._denoiser = self.measured or denoiser
        self._slots: Slots | None = None
        self._held: HeldSlots | None = None
        self._on_device = ExitStack()

    def change(self, rows: Sequence[Row]) -> None:
        """Replace the current rows. Rows that leave get their state back."""
        wanted = set(rows)
        if wanted == set(self.rows):
            return
        self.read()
        self._on_device.close()
        staying = [index for index, row in enumerate(self.rows) if row in wanted]
        parts = []
        if self._slots is not None:
            for index, row in enumerate(self.rows):
                if row not in wanted and row.stage == self.stage and row.to_go:
                    row.slots = self._slots.take([index])
            if staying:
                parts.append(self._slots.take(staying))
        joining = [row for row in rows if row.slots is not None]
        parts += [row.slots for row in joining if row.slots is not None]
        self.rows = [*(self.rows[index] for index in staying), *joining]
        for row in joining:
            row.slots = None
        self._join(parts)

    def _join(self, parts: list[Slots]) -> None:
        self._slots = self._held = None
        self.size = 0
        if parts:
            joined = Slots.join(parts)
            self.size = self.sizes.padded(len(joined))
            if self.size > len(joined):
                joined = joined.take(np.minimum(np.arange(self.size), len(joined) - 1))
            self._slots = joined

    def step(self) -> dict[Row, EngineError]:
        """Take a step of every row. Returns the rows that failed, with their error."""
        slots = self._slots
        assert slots is not None
        if self._held is None:
            sizes = range(1, self.size + 1) if self.sizes.any_size else self.sizes.prepared
            self._held = self._on_device.enter_context(hold(slots, self._denoiser, sizes))
        before = vars(slots).copy()  # a step replaces these arrays
        try:
            self._held.advance()
        except EngineError as error:
            self._on_device.close()
            self._held = None
            if self.measured is None:
                lost, self.rows, self._slots = self.rows, [], None  # their state was on the device
                return dict.fromkeys(lost, error)
            vars(slots).update(before)
            return self._each_alone(slots)
        for row in self.rows:
            row.to_go -= 1
            row.done += 1
        return {}

    def _each_alone(self, slots: Slots) -> dict[Row, EngineError]:
        """Repeat the step row by row, to find the rows that fail."""
        parts, failed, well = [], {}, []
        for index, row in enumerate(self.rows):
            alone = slots.take([index])
            try:
                advance(alone, self._denoiser)  # which pads it to a prepared size
            except EngineError as error:
                failed[row] = error
                continue
            row.to_go -= 1
            row.done += 1
            parts.append(alone)
            well.append(row)
        self.rows = well
        self._join(parts)
        return failed

    def read(self) -> None:
        """Update the rows' state from the device."""
        if self._held is not None:
            self._held.read()

    def x(self, row: Row) -> Images:
        """The state of a row after :meth:`read`, float32 [C, H, W]."""
        assert self._slots is not None
        x: Images = self._slots.x[self.rows.index(row)]
        return x

    def x_0(self, row: Row) -> Images:
        """The last x_0 prediction of a row after :meth:`read`, float32 [C, H, W]."""
        assert self._slots is not None
        x_0: Images = self._slots.x_0[self.rows.index(row)]
        return x_0

    def close(self) -> None:
        """Drop the rows."""
        self._on_device.close()
        self.rows, self._slots, self._held = [], None, None
