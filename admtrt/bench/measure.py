"""The measurement: every row in its own process, stepped in turn."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from admtrt.bench.remote import RemoteError
from admtrt.bench.report import Measurement, spread_of
from admtrt.bench.rows import EAGER, ORIGINAL, Row
from admtrt.verify.report import sample_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from admtrt.bench.contender import Prepared, StepTime
    from admtrt.contract import Precision

_REFERENCES = (Row(EAGER), Row(ORIGINAL), Row("onnxruntime"))


class RemoteRow(Protocol):
    """An object whose methods are called by name, such as :class:`~admtrt.bench.remote.Remote`."""

    def call(self, method: str, *arguments: object) -> Any:
        """See :meth:`admtrt.bench.remote.Remote.call`."""
        ...


@dataclass
class _RowRun:
    """The state of a row's measurement at one batch size."""

    row: Row
    contender: RemoteRow
    times: list[StepTime] = field(default_factory=list)
    prepared: Prepared | None = None
    sampling: float | None = None
    memory: int | None = None
    reason: str = ""

    def attempt(self, method: str, *arguments: object) -> Any:
        """Call the contender unless it has failed; None if it fails."""
        if self.reason:
            return None
        try:
            return self.contender.call(method, *arguments)
        except RemoteError as error:
            self.reason = str(error)
            return None


@dataclass(frozen=True)
class Round:
    """All rows at one batch size, and the name of the row that errors are relative to ("" for none)."""

    measurements: tuple[Measurement, ...]
    reference: str


class Bench:
    """Measures rows.

    Args:
        contenders: a remote :class:`~admtrt.bench.contender.Contender` for each row, or why there is none.
        yardstick: a :class:`~admtrt.bench.yardstick.Yardstick`; None if the peak cannot be measured.
        operations: operations of a step for one image; None if they could not be counted.
        note: called with progress messages.

    Attributes:
        peaks: best peak so far by precision, in operations per second.
    """

    def __init__(
        self,
        contenders: Mapping[Row, RemoteRow | str],
        yardstick: RemoteRow | None,
        operations: int | None,
        note: Callable[[str], None],
    ) -> None:
        self._contenders = contenders
        self._yardstick = yardstick
        self._operations = operations
        self._note = note
        self.peaks: dict[Precision, float] = {}

    def run(self, batch: int, repeat: int, sampling_steps: int | None) -> Round:
        """Measure every row at one batch size; a row that fails says why and the others go on.

        Each repetition visits all rows, starting with a different one, so that temporary slowdowns affect all
        alike.
        """
        runs = [
            _RowRun(row, contender)
            for row, contender in self._contenders.items()
            if not isinstance(contender, str)
        ]
        for run in runs:
            self._note(f"preparing {run.row}, batch {batch}")
            run.prepared = run.attempt("prepare", batch)
        for repetition in range(repeat):
            working = [run for run in runs if not run.reason]
            if not working:
                break
            self._note(f"batch {batch}, repetition {repetition + 1} of {repeat}")
            first = repetition % len(working)
            for run in (*working[first:], *working[:first]):
                time = run.attempt("step")
                if time is not None:
                    run.times.append(time)
            self._measure_peaks({run.row.precision for run in working})
        for run in runs:
            run.memory = run.attempt("memory")
            if sampling_steps is not None:
                self._note(f"sampling {run.row}, batch {batch}")
                run.sampling = run.attempt("sample", sampling_steps)
        return self._round(batch, {run.row: run for run in runs})

    def _measure_peaks(self, precisions: set[Precision]) -> None:
        if self._yardstick is None:
            return
        for precision in sorted(precisions):
            with contextlib.suppress(RemoteError):  # PyTorch lacks this precision here: show no peak
                speed: float = self._yardstick.call("measure", precision)
                self.peaks[precision] = max(self.peaks.get(precision, 0.0), speed)

    def _round(self, batch: int, runs: Mapping[Row, _RowRun]) -> Round:
        outputs = {row: s.prepared.outputs for row, s in runs.items() if s.prepared is not None}
        reference = next((row for row in _REFERENCES if row in outputs), None)
        expected = {} if reference is None else outputs[reference]
        made = []
        for row, contender in self._contenders.items():
            run = runs.get(row)
            if run is None:
                made.append(Measurement(row, batch, reason=str(contender)))
            elif not run.times or run.prepared is None:
                made.append(Measurement(row, batch, reason=run.reason))
            else:
                errors = {} if row == reference else _errors(run.prepared.outputs, expected)
                made.append(replace(self._measurement(batch, run), errors=errors))
        return Round(tuple(made), "" if reference is None else str(reference))

    def _measurement(self, batch: int, run: _RowRun) -> Measurement:
        times, prepared = run.times, run.prepared
        assert prepared is not None
        gradients = [time.classifier_gradient for time in times if time.classifier_gradient is not None]
        outside = [time.outside / time.step for time in times if time.outside is not None]
        return Measurement(
            row=run.row,
            batch=batch,
            step=spread_of([time.step for time in times]),
            unet=spread_of([time.unet for time in times]),
            classifier_gradient=spread_of(gradients) if gradients else None,
            outside=float(np.median(outside)) if outside else None,
            guides={name: spread_of([time.guides[name] for time in times]) for name in times[0].guides},
            operations=None if self._operations is None else batch * self._operations,
            memory=run.memory,
            ready=prepared.ready,
            sampling=run.sampling,
            notes=(*prepared.notes, *((run.reason,) if run.reason else ())),
        )


def _errors(outputs: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float | None]:
    """The worst sample's error of each output; None if it is not finite."""
    worst = {
        name: float(sample_errors(outputs[name], array).max())
        for name, array in expected.items()
        if name in outputs
    }
    return {name: error if np.isfinite(error) else None for name, error in worst.items()}
