"""Throughput of several ways to do one task: each runs in its own process, and they take turns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from admtrt.bench.machine import describe_machine, machine_lines
from admtrt.bench.remote import Remote, RemoteError
from admtrt.bench.report import Spread, shown, spread_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from admtrt.bench.rows import Device
    from admtrt.config import ClassifierConfig, UNetConfig
    from admtrt.contract import Precision

COLUMNS = ("images/s", "spread", "speed", "peak", "GiB", "ready s")


@dataclass(frozen=True)
class ThroughputRow:
    """One way to do the task, a row of the table.

    Attributes:
        name: name of the row.
        precision: precision in which it computes; its speed is compared with the peak of this precision.
        factory, arguments: ``factory(*arguments)``, called in the row's process, makes an object with the
            methods ``step``, ``ready`` and ``memory`` of :class:`admtrt.bench.training_rows.Trainer`.
    """

    name: str
    precision: Precision
    factory: Callable[..., object]
    arguments: tuple[object, ...]


@dataclass(frozen=True)
class Measuring:
    """Settings for measuring rows.

    Attributes:
        repeat: number of steps timed for every row.
        device: device of the measurement.
        threads: CPU threads of every row and of the measurement of the peak.
        scratch: folder for logs.
        note: called with messages about the progress.
    """

    repeat: int
    device: Device
    threads: int
    scratch: Path
    note: Callable[[str], None]


@dataclass(frozen=True)
class ThroughputMeasurement:
    """The measurement of one row.

    Attributes:
        row: name of the row.
        precision: precision of its networks.
        batch: images per step.
        reason: why the row was not measured, or why it failed; empty otherwise.
        step: duration of a step, seconds.
        memory: peak resident memory of its process, bytes.
        ready: seconds from the start to the end of the first step.
    """

    row: str
    precision: Precision
    batch: int
    reason: str = ""
    step: Spread | None = None
    memory: int | None = None
    ready: float | None = None

    @property
    def images_per_second(self) -> float | None:
        """Images per second of the median step."""
        return None if self.step is None else self.batch / self.step.median


@dataclass(frozen=True)
class ThroughputReport:
    """The results of one benchmark.

    Attributes:
        subject: what was measured.
        machine: device, versions, threads.
        measurements: the rows; speeds are relative to the first row that was measured.
        operations: floating-point operations per image; None if they could not be counted.
        peaks: by precision, operations per second of large matrix products.
    """

    subject: str
    machine: Mapping[str, Any]
    measurements: tuple[ThroughputMeasurement, ...]
    operations: int | None
    peaks: Mapping[Precision, float]

    def ratio(self, one: ThroughputMeasurement) -> float | None:
        """Speed of a row relative to the first that was measured."""
        base = next((m.images_per_second for m in self.measurements if m.step is not None), None)
        return None if base is None or one.images_per_second is None else one.images_per_second / base

    def of_peak(self, one: ThroughputMeasurement) -> float | None:
        """A row's speed as a fraction of the peak in its precision."""
        peak = self.peaks.get(one.precision)
        speed = one.images_per_second
        if peak is None or speed is None or self.operations is None:
            return None
        return speed * self.operations / peak

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, in seconds, bytes, and operations per second."""
        return {
            "subject": self.subject,
            "machine": dict(self.machine),
            "operations": self.operations,
            "peaks": dict(self.peaks),
            "rows": [
                {
                    **asdict(m),
                    "images_per_second": m.images_per_second,
                    "of_peak": self.of_peak(m),
                    "ratio": self.ratio(m),
                }
                for m in self.measurements
            ],
        }

    def cells(self) -> list[list[str]]:
        """The rows as text, under ``row`` and :data:`COLUMNS`."""
        return [[m.row, *self._cells(m)] for m in self.measurements]

    def _cells(self, m: ThroughputMeasurement) -> list[str]:
        if m.step is None:
            return [""] * len(COLUMNS)
        return [
            shown(m.images_per_second),
            f"{(m.step.upper - m.step.lower) / m.step.median:.0%}",
            shown(self.ratio(m), "{:.2f}x"),
            shown(self.of_peak(m), "{:.0%}"),
            shown(m.memory and m.memory / 2**30, "{:.2f}"),
            shown(m.ready, "{:.1f}"),
        ]

    def footnotes(self) -> list[str]:
        """Notes: why rows are empty, the machine, the peaks and the operations of an image."""
        peaks = ", ".join(f"{name} {value / 1e9:,.0f} GFLOP/s" for name, value in self.peaks.items())
        return [
            *(f"{m.row}: {m.reason}" for m in self.measurements if m.reason),
            *machine_lines(self.machine),
            *([f"peak: {peaks}"] if peaks else []),
            *([f"an image takes {self.operations / 1e9:,.2f} GFLOP"] if self.operations else []),
        ]

    def markdown(self) -> str:
        """The table for a document."""
        heads = ["row", *COLUMNS]
        lines = [heads, ["---"] * len(heads), *self.cells()]
        return "\n".join(
            [
                f"**{self.subject}**",
                "",
                *("| " + " | ".join(line) + " |" for line in lines),
                "",
                *(f"- {line}" for line in self.footnotes()),
                "",
            ]
        )


def measure_rows(
    subject: str,
    rows: Sequence[ThroughputRow],
    how: Measuring,
    *,
    batch: int,
    counted: UNetConfig | ClassifierConfig | int | None,
) -> ThroughputReport:
    """Measure rows, one step of each in turn, so that a slowdown of the machine affects all equally.

    Args:
        subject: heading of the report.
        rows: rows in the order of the table.
        how: settings of the measurement.
        batch: images per step.
        counted: a network, to count the operations of its training step; or operations per image; or None.
    """
    reasons, ready = dict[str, str](), dict[str, float]()
    memory, remotes = dict[str, int](), dict[str, Remote]()
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    peaks: dict[Precision, float] = {}
    yardstick, gpu = None, None
    operations = counted if isinstance(counted, int) else None
    try:
        if find_spec("torch") is not None:
            from admtrt.bench.yardstick import Yardstick

            yardstick = Remote(Yardstick, how.device, how.threads, log=how.scratch / "yardstick.log")
            gpu = yardstick.call("gpu")
            if counted is not None and not isinstance(counted, int):
                operations = yardstick.call("count_training", counted)
        for index, row in enumerate(rows):
            how.note(f"preparing {row.name}")
            try:
                remote = Remote(row.factory, *row.arguments, log=how.scratch / f"row-{index}.log")
                remotes[row.name] = remote
                ready[row.name] = remote.call("ready")
            except RemoteError as error:
                reasons[row.name] = str(error)
        for repetition in range(how.repeat):
            how.note(f"repetition {repetition + 1} of {how.repeat}")
            working = [row for row in rows if row.name not in reasons]
            first = repetition % max(1, len(working))
            for row in (*working[first:], *working[:first]):
                try:
                    times[row.name].append(remotes[row.name].call("step"))
                except RemoteError as error:
                    reasons[row.name] = str(error)
            if yardstick is None:
                continue
            for precision in sorted({row.precision for row in working}):
                speed = yardstick.call("measure", precision)
                peaks[precision] = max(peaks.get(precision, 0.0), speed)
        for name, remote in remotes.items():
            if name not in reasons:
                memory[name] = remote.call("memory")
    finally:
        for each in (*remotes.values(), *([] if yardstick is None else [yardstick])):
            each.close()
    measurements = tuple(
        ThroughputMeasurement(
            row.name,
            row.precision,
            batch,
            reasons.get(row.name, ""),
            spread_of(times[row.name]) if times[row.name] else None,
            memory.get(row.name),
            ready.get(row.name),
        )
        for row in rows
    )
    return ThroughputReport(subject, describe_machine(how.threads, gpu), measurements, operations, peaks)
