"""Conditioning on images: rows whose state is edited before the next evaluation.

The graphs ``edit`` and ``edit_low_pass`` work on the state x that a row leads to, with a second noise z2::

    x''  = c x + renoise z2                          a jump back, q(x_{t+j} | x_t)
    x''' = x'' + keep P(reference r + noise z2 - x'')    r the given image, P a mask or a low-pass filter

The factor c = sqrt(a_{t+j} / a_t) multiplies the row's own columns here; renoise^2 = 1 - c^2. A row stays one
evaluation of the networks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np

from admtrt.errors import RequestError
from admtrt.schedule.jumps import MOST_EVALUATIONS, evaluated_steps
from admtrt.schedule.rows import in_order

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from admtrt.schedule.rows import Rows

    Float64 = NDArray[np.float64]

EditGraph = Literal["edit", "edit_low_pass"]
EDIT_GRAPHS: tuple[EditGraph, ...] = get_args(EditGraph)
EDIT = ("keep", "reference", "noise", "renoise")
"""Columns of the graphs ``edit`` and ``edit_low_pass``, in order."""
_OF_THE_STATE = ("guidance", "noise", "shift")
"""Columns that weigh terms of the next state and are not named prev_from_*."""


@dataclass(frozen=True)
class KnownRegion:
    """Known pixels, as in RePaint (Lugmayr et al. 2022, algorithm 1).

    They are replaced by the image noised to the level of the next evaluation, and at the end by the image
    itself.

    Attributes:
        jump: (L, N), see :func:`~admtrt.schedule.jumps.evaluated_steps`; None for no jumps.
        as_sampled: keep the networks' output in the known pixels of the result, as the original does.
    """

    graph: ClassVar[EditGraph] = "edit"
    jump: tuple[int, int] | None = None
    as_sampled: bool = False

    def applied(self, rows: Rows) -> Rows:
        """Rows of a respaced process with these edits.

        Raises:
            RequestError: as :func:`~admtrt.schedule.jumps.evaluated_steps`.
        """
        steps = np.array(evaluated_steps(len(rows), self.jump))
        alpha_bar = _alpha_bar(rows)[::-1]
        back = np.ones(len(steps))
        back[:-1] = np.sqrt(alpha_bar[steps[1:]] / alpha_bar[steps[:-1] - 1])
        following = np.append(alpha_bar[steps[1:]], 1.0)
        keep = np.ones(len(steps))
        keep[-1] = not self.as_sampled
        edited = _scaled(in_order(rows, len(rows) - 1 - steps), back)
        edits = [keep, np.sqrt(following), np.sqrt(1 - following), np.sqrt(1 - back**2)]
        return replace(edited, edits=np.stack(edits, axis=1), edit_graph=self.graph)


@dataclass(frozen=True)
class LowPass:
    """Low frequencies of a reference, as in ILVR (Choi et al. 2021, algorithm 1).

    They are replaced by those of the reference noised to the level of the evaluation, which is one step
    noisier than the state: as published.

    Attributes:
        until: steps from this one down are not edited; 0 leaves out the last step (the original's
            ``range_t``).
    """

    graph: ClassVar[EditGraph] = "edit_low_pass"
    until: int = 0

    def applied(self, rows: Rows) -> Rows:
        """Rows of a respaced process with these edits.

        Raises:
            RequestError: if no step is left to edit.
        """
        if self.until >= len(rows) - 1:
            raise RequestError(
                f"a reference that holds until step {self.until} holds in none of {len(rows)} evaluations",
                hint=f"Let it hold until step {max(len(rows) - 2, 0)} or lower, or take more steps.",
            )
        alpha_bar = _alpha_bar(rows)
        keep = np.arange(len(rows))[::-1] > self.until
        edits = [keep, keep * np.sqrt(alpha_bar), keep * np.sqrt(1 - alpha_bar), np.zeros(len(rows))]
        return replace(rows, edits=np.stack(edits, axis=1), edit_graph=self.graph)


@dataclass(frozen=True)
class Recurrence:
    """Evaluate every level several times, with noise added back in between; without an image.

    The self-recurrence of Universal Guidance (Bansal et al. 2023) and FreeDoM's time travel.

    Attributes:
        times: evaluations of each level, 2 or more.
    """

    graph: ClassVar[EditGraph] = "edit"
    times: int

    def applied(self, rows: Rows) -> Rows:
        """Rows of a respaced process with these edits.

        Raises:
            RequestError: if there would be too many evaluations.
        """
        total = len(rows) * self.times
        if total > MOST_EVALUATIONS:
            raise RequestError(
                f"{len(rows)} steps taken {self.times} times are {total} evaluations; at most "
                f"{MOST_EVALUATIONS} are possible"
            )
        alpha_bar = _alpha_bar(rows)
        up = np.sqrt(alpha_bar / np.append(alpha_bar[1:], 1.0))
        again = (np.arange(total) + 1) % self.times != 0
        back = np.where(again, np.repeat(up, self.times), 1.0)
        repeated = _scaled(in_order(rows, np.repeat(np.arange(len(rows)), self.times)), back)
        zeros = np.zeros(total)
        edits = np.stack([zeros, zeros, zeros, np.sqrt(1 - back**2)], axis=1)
        return replace(repeated, edits=edits, edit_graph=self.graph)


Edit = KnownRegion | LowPass | Recurrence


def _scaled(rows: Rows, back: Float64) -> Rows:
    """Rows with their next states multiplied by a factor."""
    columns = {
        name: column * back if name in _OF_THE_STATE or name.startswith("prev_from") else column
        for name, column in rows.columns.items()
    }
    return replace(rows, columns=columns)


def _alpha_bar(rows: Rows) -> Float64:
    lam = np.array([level.lam for level in rows.levels])
    return np.asarray(1 / (1 + np.exp(-2 * lam)))
