"""Requests in flight and their rows."""

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
    """An event with predictions of x_0 while drawing.

    Attributes:
        step: average number of evaluations done by the request's rows.
        images: float32 [C, H, W] of each row; None for a row that has not begun.
    """

    step: int
    images: list[Images | None]


@dataclass(frozen=True)
class Done:
    """The last event of a successful request.

    Attributes:
        images: float32 [C, H, W] of each row.
        queued: seconds until the first step.
        drawn: seconds from the first step to the end.
    """

    images: list[Images]
    queued: float
    drawn: float


@dataclass(frozen=True)
class Failed:
    """The last event of a failed request, with the reason for people."""

    reason: Reason
    message: str
    hint: str = ""


Event = Preview | Done | Failed


@dataclass(eq=False)
class Row:
    """One sample of a request.

    Attributes:
        flight: the request.
        index: index among the request's rows.
        stage: the row's current stage of the model.
        to_go: evaluations left in this stage.
        done: evaluations done, in all stages.
        slots: its state, one slot; None before it begins and while a station holds it.
        x_0: its last prediction that was read, float32 [C, H, W].
        result: the result of the last stage, float32 [C, H, W].
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
        draw: what to draw.
        notify: called with every event from the engine's thread; must not block.
        client: name of the client, for fairness.
        priority: ``batch`` requests get what interactive ones leave, and at least a tenth.
        deadline: in the engine's clock; None without a deadline.
        preview_every: evaluations between previews; 0 for no previews.
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
        """Evaluations of a row, in all stages."""
        return sum(self.draw.steps)

    @property
    def step(self) -> int:
        """Average number of evaluations done by its rows, rounded down."""
        return sum(row.done for row in self.rows) // len(self.rows)

    @property
    def drawn(self) -> bool:
        """True if every row has its result."""
        return all(row.result is not None for row in self.rows)

    def preview_is_due(self) -> bool:
        """True once per ``preview_every`` evaluations."""
        if not self.preview_every or self.step - self._shown < self.preview_every:
            return False
        self._shown = self.step - self.step % self.preview_every
        return self.step < self.total
