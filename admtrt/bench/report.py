"""Results of a measurement, as data and as tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.bench.machine import machine_lines
from admtrt.bench.rows import EAGER, ORIGINAL, Row
from admtrt.schedule.guides import GUIDE_GRAPH

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from admtrt.contract import GraphName, Precision

SPEED_COLUMNS = ("UNet", "grad", "step", "spread", "speed", "peak", "rest", "error out", "error grad")
COST_COLUMNS = ("GFLOP/s", "GiB", "ready s")
"""Column headings; docs/benchmarks.md explains them."""
LEGEND = (
    "columns: UNet, grad and step in ms; spread, distance of the quartiles over the median (large: the "
    "machine was busy); speed, of the step relative to the row in the title; peak, the step's GFLOP/s "
    "as part of the best measured here; rest, part of the step outside its graphs; errors, largest "
    "difference over largest value"
)

_WHOLE = 100  # larger numbers are shown without decimals


@dataclass(frozen=True)
class Spread:
    """Seconds of repeated measurements: the minimum, the quartiles, and their number."""

    minimum: float
    lower: float
    median: float
    upper: float
    count: int


def spread_of(seconds: Sequence[float]) -> Spread:
    """Summarise at least one measurement."""
    lower, median, upper = np.percentile(seconds, (25, 50, 75)).tolist()
    return Spread(min(seconds), lower, median, upper, len(seconds))


@dataclass(frozen=True)
class Measurement:
    """One row at one batch size.

    Attributes:
        row, batch: the row and the batch size.
        reason: why nothing was measured; empty if the measurement succeeded.
        step, unet, classifier_gradient: seconds of the guided step and of its graphs.
        outside: median time of the step outside its graphs; None if the graphs were timed separately.
        guides: seconds of the graph of each further guide, by name.
        guide_memory: peak resident memory of a process that runs only this graph, in bytes.
        errors: by output, the largest difference from the reference over the largest value, of the worst
            sample.
        operations: operations per step of the whole batch; None if they could not be counted.
        memory: peak resident memory of the row's process so far, in bytes.
        ready: seconds until the end of the first step.
        sampling: seconds of a whole run; None if not requested.
        notes: the row's own notes.
    """

    row: Row
    batch: int
    reason: str = ""
    step: Spread | None = None
    unet: Spread | None = None
    classifier_gradient: Spread | None = None
    outside: float | None = None
    guides: Mapping[str, Spread] = field(default_factory=dict)
    guide_memory: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, float | None] = field(default_factory=dict)
    operations: int | None = None
    memory: int | None = None
    ready: float | None = None
    sampling: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def speed(self) -> float | None:
        """Operations per second in a step."""
        if self.step is None or self.operations is None:
            return None
        return self.operations / self.step.median


@dataclass(frozen=True)
class BenchReport:
    """A run of the bench.

    Attributes:
        subject: what was measured.
        machine: device, versions, threads.
        measurements: every row at every batch size, in order.
        reference: by batch size, the row that errors are relative to.
        nodes: by form (``bundle``, ``plain-onnx``), nodes of each graph.
        operations: by graph, for one image; for a guide's graph as counted by the export.
        peaks: by precision, operations per second of large products.
        startup: seconds of imports and openings, by name.
        sampling_steps: number of steps of a whole run; None if not requested.
    """

    subject: str
    machine: Mapping[str, Any]
    measurements: tuple[Measurement, ...]
    reference: Mapping[int, str]
    nodes: Mapping[str, Mapping[GraphName, int]]
    operations: Mapping[str, int]
    peaks: Mapping[Precision, float]
    startup: Mapping[str, float]
    sampling_steps: int | None = None

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes in order."""
        return tuple(dict.fromkeys(measurement.batch for measurement in self.measurements))

    def at(self, batch: int) -> tuple[Measurement, ...]:
        """The rows at one batch size."""
        return tuple(m for m in self.measurements if m.batch == batch)

    def baseline(self, batch: int) -> Measurement | None:
        """The baseline of a batch size: the original in fp32, else admtrt's eager PyTorch."""
        measured = {m.row: m for m in self.at(batch) if m.step is not None}
        return next((measured[row] for row in (Row(ORIGINAL), Row(EAGER)) if row in measured), None)

    def ratio(self, measurement: Measurement) -> float | None:
        """Speed of a row's step relative to the baseline's."""
        baseline = self.baseline(measurement.batch)
        if baseline is None or baseline.step is None or measurement.step is None:
            return None
        return baseline.step.median / measurement.step.median

    def of_peak(self, measurement: Measurement) -> float | None:
        """A row's speed as a fraction of the peak in its precision."""
        peak = self.peaks.get(measurement.row.precision)
        return None if peak is None or measurement.speed is None else measurement.speed / peak

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, in seconds, bytes, and operations per second."""
        rows = [
            {
                "name": m.row.name,
                "precision": m.row.precision,
                **{key: value for key, value in asdict(m).items() if key != "row"},
                "operations_per_second": m.speed,
                "of_peak": self.of_peak(m),
                "ratio": self.ratio(m),
            }
            for m in self.measurements
        ]
        baselines = {str(batch): self.baseline(batch) for batch in self.batches}
        return {
            "subject": self.subject,
            "machine": dict(self.machine),
            "rows": rows,
            "reference": {str(batch): name for batch, name in self.reference.items()},
            "baseline": {batch: None if m is None else str(m.row) for batch, m in baselines.items()},
            "nodes": {form: dict(nodes) for form, nodes in self.nodes.items()},
            "operations": dict(self.operations),
            "peaks": dict(self.peaks),
            "startup": dict(self.startup),
            "sampling_steps": self.sampling_steps,
        }

    def speed_cells(self, batch: int) -> list[list[str]]:
        """The rows of one batch size as text, under ``row`` and :data:`SPEED_COLUMNS`."""
        return [[str(m.row), *self._speed(m)] for m in self.at(batch)]

    def cost_cells(self, batch: int) -> list[list[str]]:
        """The same under ``row`` and :meth:`cost_columns`."""
        return [[str(m.row), *self._cost(m)] for m in self.at(batch)]

    def cost_columns(self) -> tuple[str, ...]:
        """:data:`COST_COLUMNS`, the guides of the bundle, and the whole run if one was timed."""
        guides = [f"{GUIDE_GRAPH}{name}" for name in self._guides]
        return (
            *COST_COLUMNS,
            *guides,
            *(() if self.sampling_steps is None else (f"{self.sampling_steps} steps s",)),
        )

    def remarks(self, batch: int) -> list[str]:
        """Notes below the table: reasons of empty rows, and the rows' notes."""
        return [f"{m.row}: {text}" for m in self.at(batch) for text in ((m.reason,) if m.reason else m.notes)]

    def title(self, batch: int) -> str:
        """Title of the table of one batch size."""
        baseline = self.baseline(batch)
        against = "" if baseline is None else f", speed relative to {baseline.row}"
        errors = f", errors from {self.reference[batch]}" if batch in self.reference else ""
        return f"{self.subject}, batch {batch}: times in ms{against}{errors}"

    def markdown(self) -> str:
        """The tables for a document."""
        parts = []
        for batch in self.batches:
            heads = ["row", *SPEED_COLUMNS, *self.cost_columns()]
            rows = [[str(m.row), *self._speed(m), *self._cost(m)] for m in self.at(batch)]
            lines = [heads, ["---"] * len(heads), *rows]
            parts += ["", f"**{self.title(batch)}**", ""]
            parts += ["| " + " | ".join(line) + " |" for line in lines]
            parts += ["", *(f"- {remark}" for remark in self.remarks(batch))]
        return "\n".join([*parts, "", *(f"- {line}" for line in self.footnotes())]) + "\n"

    def footnotes(self) -> list[str]:
        """The legend, the machine, peaks, operations, nodes and start-up, one line each."""
        peaks = ", ".join(f"{name} {value / 1e9:,.0f} GFLOP/s" for name, value in self.peaks.items())
        counted = ", ".join(f"{name} {value / 1e9:,.2f} GFLOP" for name, value in self.operations.items())
        nodes = "; ".join(
            f"{form}: {', '.join(f'{name} {count:,}' for name, count in graphs.items())}"
            for form, graphs in self.nodes.items()
        )
        startup = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in self.startup.items())
        named = {"peak": peaks, "operations for one image": counted, "nodes": nodes, "start-up": startup}
        lines = [f"{name}: {text}" for name, text in named.items() if text]
        return [LEGEND, *machine_lines(self.machine), *lines]

    def _speed(self, m: Measurement) -> list[str]:
        if m.step is None:
            return [""] * len(SPEED_COLUMNS)
        return [
            *(
                shown(None if spread is None else 1e3 * spread.median)
                for spread in (m.unet, m.classifier_gradient, m.step)
            ),
            f"{(m.step.upper - m.step.lower) / m.step.median:.0%}",
            shown(self.ratio(m), "{:.2f}x"),
            shown(self.of_peak(m), "{:.0%}"),
            shown(m.outside, "{:.1%}"),
            *(_error(m, name) for name in ("out", "grad")),
        ]

    @property
    def _guides(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for m in self.measurements for name in m.guides))

    def _guide(self, m: Measurement, name: str) -> str:
        """Milliseconds of a guide's graph; its speed as a fraction of the peak, its memory and its error."""
        graph = f"{GUIDE_GRAPH}{name}"
        spread, operations = m.guides.get(name), self.operations.get(graph)
        if spread is None:
            return ""
        peak = self.peaks.get(m.row.precision)
        share = operations and peak and m.batch * operations / spread.median / peak
        memory = m.guide_memory.get(name)
        told = (
            shown(share or None, "{:.0%}"),
            shown(memory and memory / 2**30, "{:.2f} GiB"),
            _error(m, graph),
        )
        remarks = [text for text in told if text]
        return shown(1e3 * spread.median) + (f" ({', '.join(remarks)})" if remarks else "")

    def _cost(self, m: Measurement) -> list[str]:
        return [
            shown(m.speed and m.speed / 1e9),
            shown(m.memory and m.memory / 2**30, "{:.2f}"),
            shown(m.ready, "{:.1f}"),
            *(self._guide(m, name) for name in self._guides),
            *(() if self.sampling_steps is None else (shown(m.sampling, "{:.2f}"),)),
        ]


def _error(m: Measurement, name: str) -> str:
    if name not in m.errors:
        return ""
    return "0" if m.errors[name] == 0 else shown(m.errors[name], "{:.0e}", "NaN")


def shown(value: float | None, form: str = "", missing: str = "") -> str:
    """Format a number for people, by default with three digits."""
    if value is None:
        return missing
    return form.format(value) if form else f"{value:.0f}" if value >= _WHOLE else f"{value:.3g}"
