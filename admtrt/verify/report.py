"""Report of a verification: its rows, its verdict, and the error measure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

Stage = Literal["build", "manifest", "graph", "step", "trajectory", "image"]
Status = Literal["pass", "build", "run", "compare"]
"""``build``: a graph could not be loaded. ``run``: a graph raised, broke its contract or returned non-finite
values. ``compare``: the bundle differs from the checkpoints."""

EXIT_CODES: Mapping[Status, int] = {"build": 3, "run": 4, "compare": 1, "pass": 0}
"""The most severe failure first, which determines the exit code."""


@dataclass(frozen=True)
class Place:
    """The sample with the largest error: the networks' ``t``, its label, the size of its batch."""

    t: float
    y: int | None
    batch: int

    def __str__(self) -> str:
        label = "" if self.y is None else f" y={self.y}"
        return f"t={self.t:g}{label} N={self.batch}"


@dataclass(frozen=True)
class Row:
    """The outcome of one check.

    Attributes:
        stage: the stage of the check.
        what: the graph or sampler, and the value compared.
        status: passed, or the class of its failure.
        error: the largest measured error; None if nothing was measured.
        tolerance: the largest error that passes; None like ``error``.
        where: the sample with the largest error.
        detail: why it failed, if the numbers do not show it; or what was left out.
    """

    stage: Stage
    what: str
    status: Status
    error: float | None = None
    tolerance: float | None = None
    where: Place | None = None
    detail: str = ""


@dataclass(frozen=True)
class VerificationReport:
    """Every check of a bundle in order, and the drift of its trajectories.

    Attributes:
        bundle: its directory.
        rows: the checks.
        drift: by sampler, the largest error of x_t after each step; shorter if a graph failed.
    """

    bundle: str
    rows: tuple[Row, ...]
    drift: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True if every check passed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that did not pass."""
        return tuple(row for row in self.rows if row.status != "pass")

    @property
    def outcome(self) -> Status:
        """``pass``, or the most severe kind of failure."""
        found = {row.status for row in self.rows}
        return next((status for status in EXIT_CODES if status in found), "pass")

    @property
    def exit_code(self) -> int:
        """0 passed, 1 compare, 3 build, 4 run."""
        return EXIT_CODES[self.outcome]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "bundle": self.bundle,
            "passed": self.passed,
            "outcome": self.outcome,
            "rows": [asdict(row) for row in self.rows],
            "drift": {
                name: [error if np.isfinite(error) else None for error in errors]
                for name, errors in self.drift.items()
            },
        }


def sample_errors(actual: ArrayLike, expected: ArrayLike) -> NDArray[np.float64]:
    """Max abs difference over max abs reference of each sample, float64 [N]; never pooled over the batch.

    NaN or infinity if either side is not finite.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    # Finite float32 values cannot overflow here; non-finite ones should show in the result, without warnings.
    with np.errstate(invalid="ignore"):
        difference = np.abs(actual - expected).reshape(len(expected), -1).max(axis=1)
        largest = np.abs(expected).reshape(len(expected), -1).max(axis=1)
        errors: NDArray[np.float64] = difference / np.maximum(largest, np.finfo(np.float32).tiny)
    return errors


class Tally:
    """Collects the cases of one row and keeps the worst sample.

    Args:
        stage, what: stage and subject of the row.
        tolerance: the largest error that passes.
    """

    def __init__(self, stage: Stage, what: str, tolerance: float) -> None:
        self._stage: Stage = stage
        self._what = what
        self._tolerance = tolerance
        self._error: float | None = None
        self._where: Place | None = None
        self._fault = ""
        self._fault_status: Status = "pass"

    def add(self, errors: NDArray[np.float64], places: Sequence[Place]) -> None:
        """Take the errors of one batch, float64 [N], with the places of its samples."""
        for error, place in zip(errors.tolist(), places, strict=True):
            if not np.isfinite(error):
                self.fail("compare", f"PyTorch gives values that are not finite at {place}")
            elif self._error is None or error > self._error:
                self._error, self._where = error, place

    def judge_by(self, tolerance: float) -> None:
        """Replace the tolerance."""
        self._tolerance = tolerance

    def fail(self, status: Status, detail: str) -> None:
        """Record that a case could not be measured; the first one is reported."""
        if self._fault_status == "pass":
            self._fault_status, self._fault = status, detail

    def row(self) -> Row:
        """The resulting row."""
        status = self._fault_status
        if status == "pass" and self._error is not None and self._error > self._tolerance:
            status = "compare"
        return Row(self._stage, self._what, status, self._error, self._tolerance, self._where, self._fault)
