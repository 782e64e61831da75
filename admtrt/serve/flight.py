"""Requests in flight, and the rows that they are made of."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from admtrt.runtime.slots import Images, Slots
    from admtrt.serve.model import Draw

Priority = Literal["interactive", "batch"]
Reason = Literal["cancelled", "expired", "cut", "fault", "refused"]
_ids = itertools.count()


@dataclass(frozen=True, eq=False)
class Preview:
    """Predictions of x_0 on the way.

    Attributes:
        step: evaluations that the request's rows have done on average.
        images: float32 [C, H, W] of each row; None for one that has not begun.
    """

    step: int
    images: list[Images | None]


@dataclass(frozen=True)
class Done:
    """The end of a request whose rows are all drawn.

    Attributes:
        images: float32 [C, H, W] of each row.
        queued: seconds until its first step.
        drawn: seconds from then on.
    """

    images: list[Images]
    queued: float
    drawn: float


@dataclass(frozen=True)
class Failed:
    """Any other end of a request, and why, for people."""

    reason: Reason
    message: str
    hint: str = ""


Event = Preview | Done | Failed


@dataclass(eq=False)
class Row:
    """One sample of a request.

    Attributes:
        flight: the request.
        index: among its rows.
        stage: of the model, which the row is in.
        to_go: evaluations that are left in this stage.
        done: evaluations that were taken, of all stages.
        slots: its state, one slot; None before it begins, and while a station holds it.
        x_0: its last prediction that was looked at, float32 [C, H, W].
        result: float32 [C, H, W], of the last stage.
    """

    flight: Flight
    index: int
    to_go: int
    stage: int = 0
    done: int = 0
    slots: Slots | None = None
    x_0: Images | None = None
    result: Images | None = None


@dataclass(eq=False)
class Flight:
    """A request from its admission to its end.

    Attributes:
        draw: what is drawn.
        notify: told of every event, from the engine's thread; it must not wait.
        client: who asks, for fairness.
        priority: ``batch`` requests take what interactive ones leave, and a tenth at least.
        deadline: in the engine's clock; None for none.
        preview_every: evaluations between two previews; 0 for none.
        arrived, started: in the engine's clock.
    """

    draw: Draw
    notify: Callable[[Event], None]
    client: str = ""
    priority: Priority = "interactive"
    deadline: float | None = None
    preview_every: int = 0
    id: int = field(default_factory=_ids.__next__)
    arrived: float = 0.0
    started: float | None = None
    cancelled: bool = False
    rows: list[Row] = field(init=False)
    _shown: int = 0

    def __post_init__(self) -> None:
        self.rows = [Row(self, index, self.draw.steps[0]) for index in range(len(self.draw))]

    @property
    def total(self) -> int:
        """Evaluations of a row, of all stages."""
        return sum(self.draw.steps)

    @property
    def step(self) -> int:
        """Evaluations that its rows have done on average, rounded down."""
        return sum(row.done for row in self.rows) // len(self.rows)

    @property
    def drawn(self) -> bool:
        """Every row has its result."""
        return all(row.result is not None for row in self.rows)

    def preview_is_due(self) -> bool:
        """True once each time that as many steps as wished have gone by."""
        if not self.preview_every or self.step - self._shown < self.preview_every:
            return False
        self._shown = self.step - self.step % self.preview_every
        return self.step < self.total
