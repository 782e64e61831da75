"""Rows: a solver's weights for the next state and memory, one row per evaluation of the networks.

A sample carries its state x and three more tensors: ``saved``, which the solver defines, and ``h1`` and
``h2``, the data predictions of the two previous evaluations. m is the prediction of the current evaluation,
guided and clipped.
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
    """The evaluations of one sample, in order.

    Attributes:
        levels: noise levels of the evaluations.
        columns: weights by name, float64 [R]; see :data:`admtrt.schedule.table.UPDATE_FULL`. Missing columns
            are 0 or follow from the parameterisation and the sampler.
        init_scale, init_noise: weights of x_T and of further noise in the first state.
        edits: float64 [R, 4], the columns of the graph that edits the states, see
            :mod:`admtrt.schedule.edits`; None without edits.
        edit_graph: name of that graph.
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
    """Reorder the rows; rows may be left out or repeated."""
    columns = {name: column[order] for name, column in rows.columns.items()}
    return replace(rows, levels=[rows.levels[index] for index in order], columns=columns)


@dataclass
class RowBuilder:
    """Collects rows written in x~ = x_0 + S eps, and scales them to the networks' input.

    Args:
        levels: the noise levels of the process, which give the scale c_in.
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
        """Add an evaluation at ``level`` that leads to the state at ``to``, or to the image itself (None).

        Args:
            level: level of the evaluation.
            to: level of the next state.
            weights: of ``x``, ``x0``, ``saved``, ``h1`` and ``h2`` in the next state, and ``noise``, the
                standard deviation of fresh noise.
            keep: the weights of the next ``saved``.
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
        """The rows added so far."""
        names = sorted({name for row in self._rows for name in row})
        columns = {name: np.array([row.get(name, 0.0) for row in self._rows]) for name in names}
        return Rows(self._at, columns, init_scale, init_noise)


def _column(name: str) -> str:
    return name if name == "noise" else f"prev_from_{name}"
