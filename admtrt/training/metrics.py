"""Metrics of a run: means since the last line, as JSON lines and optionally for TensorBoard."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any

from admtrt.errors import MissingDependencyError, OutputError
from admtrt.files import atomic_file
from admtrt.reading import open_regular, parse_json
from admtrt.training.timesteps import QUARTILES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from admtrt.training.timesteps import Drawn


class Window:
    """Weighted means of per-sample values, overall and by quartile of the drawn noise levels.

    The weights correct for the timestep sampler, so that means estimate those over uniform timesteps.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}  # name -> sum of weighted values, sum of weights

    def add(
        self,
        values: Mapping[str, NDArray[np.float32]],
        drawn: Drawn,
    ) -> None:
        """Add the values [N] of a batch."""
        for name, samples in values.items():
            self._take(name, samples, drawn.weights)
            for quartile in range(QUARTILES):
                chosen = drawn.quartiles == quartile
                if chosen.any():
                    self._take(f"{name}_q{quartile}", samples[chosen], drawn.weights[chosen])

    def add_scalar(self, name: str, value: float) -> None:
        """Add a value of a whole step."""
        total, weight = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total + value, weight + 1.0)

    def _take(self, name: str, samples: NDArray[np.float32], weights: NDArray[np.float32]) -> None:
        total, weight = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (
            total + float((samples.astype("float64") * weights).sum()),
            weight + float(weights.sum(dtype="float64")),
        )

    def means(self) -> dict[str, float]:
        """The means of all added values."""
        return {name: total / weight for name, (total, weight) in self._sums.items()}

    def state(self) -> dict[str, list[float]]:
        """JSON-ready contents, which :meth:`from_state` restores exactly."""
        return {name: list(pair) for name, pair in self._sums.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, list[float]]) -> Window:
        """Restore the window from ``state``."""
        window = cls()
        window._sums = {name: (total, weight) for name, (total, weight) in state.items()}
        return window


class MetricsLog:
    """``metrics.jsonl``: one JSON object per logged step, in order; non-finite values are null.

    Attributes:
        last: the last line; empty before the first.

    Args:
        path: the file; lines of steps after ``step``, and an incomplete last line, are removed.
        step: current step of the run.
        tensorboard: a folder for TensorBoard's events, or None.
    """

    def __init__(self, path: Path, step: int, *, tensorboard: Path | None = None) -> None:
        self._path = path
        self.last: dict[str, Any] = {}
        self._board = None if tensorboard is None else summary_writer()(tensorboard, purge_step=step + 1)
        kept = [line for line in _readable_lines(path) if line["step"] <= step]
        if kept:
            self.last = kept[-1]
        with atomic_file(path) as temporary:
            temporary.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")

    def write(self, line: Mapping[str, float]) -> None:
        """Append one line of numbers with a ``step``, and sync it to the disk.

        Raises:
            OutputError: if it cannot be written.
        """
        self.last = {name: value if math.isfinite(value) else None for name, value in line.items()}
        try:
            with self._path.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(self.last, allow_nan=False) + "\n")
                opened.flush()
                os.fsync(opened.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {error.strerror or error}") from error
        if self._board is not None:
            for name, value in self.last.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Flush TensorBoard's events."""
        if self._board is not None:
            self._board.close()


def _readable_lines(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    with open_regular(path) as opened:
        for text in opened:
            try:
                line = parse_json(text)
            except ValueError:
                break  # an incomplete line, after a kill
            if not isinstance(line, dict) or type(line.get("step")) is not int:
                break  # damaged
            lines.append(line)
    return lines


def summary_writer() -> Any:
    """TensorBoard's writer class.

    Raises:
        MissingDependencyError: if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingDependencyError(
            "tensorboard", extra="tensorboard", purpose="tensorboard = true"
        ) from None
    return SummaryWriter
