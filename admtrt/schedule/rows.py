"""Rows: what a solver gives of each evaluation of the networks, as weights in the next state and memory.

A sample carries its state x and three more tensors: ``saved``, whatever the solver keeps, and ``h1`` and
``h2``, the data predictions of the two evaluations before. The prediction of this one is m, guided and
bounded.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from admtrt.schedule.edits import EditGraph
    from admtrt.schedule.levels import Level, NoiseLevels

    Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Rows:
    """The evaluations of one sample in the order of use.

    Attributes:
        levels: at which the networks are asked.
        columns: weights by name, float64 [R]; see :data:`admtrt.schedule.table.UPDATE_FULL`. Columns that are
            left out are 0 or follow from the parameterisation and the sampler.
        init_scale, init_noise: weights of x_T and of further noise in the first state.
        edits: float64 [R, 4], the columns of a graph that edits the states, see :mod:`admtrt.schedule.edits`;
            None where none does.
        edit_graph: that one.
    """

    levels: list[Level]
    columns: dict[str, Float64]
    init_scale: float = 1.0
    init_noise: float = 0.0
    edits: Float64 | None = None
    edit_graph: EditGraph | None = None

    def __len__(self) -> int:
        return len(self.levels)


def in_order(rows: Rows, order: NDArray[np.int64]) -> Rows:
    """The same rows in another order, some left out or repeated."""
    columns = {name: column[order] for name, column in rows.columns.items()}
    return replace(rows, levels=[rows.levels[index] for index in order], columns=columns)


@dataclass
class RowBuilder:
    """Collects rows that are written in x~ = x_0 + S eps, and scales them to what the networks are given.

    Args:
        levels: of the process, for the scale of the state at each level.
    """

    levels: NoiseLevels
    _at: list[Level] = field(default_factory=list)
    _rows: list[dict[str, float]] = field(default_factory=list)

    def add(
        self,
        level: Level,
        to: Level | None,
        weights: Mapping[str, float],
        *,
        keep: Mapping[str, float] | None = None,
    ) -> None:
        """One evaluation at ``level`` whose result is the state at ``to``, or the image itself.

        Args:
            level: where the networks are asked.
            to: where the state goes.
            weights: of ``x``, ``x0``, ``saved``, ``h1`` and ``h2`` in the next state, and ``noise``, the
                standard deviation of fresh noise.
            keep: the same for the next ``saved``.
        """
        c, c_next = self.levels.c_in(level), self.levels.c_in(to)
        row = {_column(name): c_next * value for name, value in weights.items()}
        row |= {f"saved_from_{name}": value for name, value in (keep or {}).items()}
        for name in ("prev_from_x", "saved_from_x"):
            if name in row:
                row[name] /= c
        self._at.append(level)
        self._rows.append(row)

    def rows(self, *, init_scale: float, init_noise: float = 0.0) -> Rows:
        """Everything that was added."""
        names = sorted({name for row in self._rows for name in row})
        columns = {name: np.array([row.get(name, 0.0) for row in self._rows]) for name in names}
        return Rows(self._at, columns, init_scale, init_noise)


def _column(name: str) -> str:
    return name if name == "noise" else f"prev_from_{name}"
