"""Bar chart of the step times of all rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from admtrt.bench.machine import machine_lines
from admtrt.bench.report import shown
from admtrt.files import atomic_file

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from admtrt.bench.report import BenchReport

_ROOM_FOR_TEXT = 1.4  # axis length relative to the longest bar
_COLORS = {"fp32": "tab:blue", "fp16": "tab:green", "bf16": "tab:orange"}


def plot_steps(report: BenchReport, path: Path) -> None:
    """Write a PNG of :func:`steps_figure`.

    Raises:
        OutputError: if the file cannot be written.
    """
    figure = steps_figure(report)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def steps_figure(report: BenchReport) -> Figure:
    """The median guided step of every row, with quartiles, in one panel per batch size.

    The legend explains the colours and names the machine; the titles name the baseline of the relative
    speeds.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    panels = {batch: [m for m in report.at(batch) if m.step is not None] for batch in report.batches}
    height = 0.8 + max(len(rows) for rows in panels.values()) * 0.35 + 1.4
    # A Figure without pyplot needs no display and no global state.
    figure = Figure(figsize=(5 * len(panels) + 2, height), layout="constrained")
    for axes, (batch, rows) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for place, m in enumerate(rows):
            assert m.step is not None
            median, lower, upper = (1e3 * value for value in (m.step.median, m.step.lower, m.step.upper))
            axes.barh(place, median, color=_COLORS[m.row.precision])
            axes.errorbar(median, place, xerr=[[median - lower], [upper - median]], color="black", capsize=2)
            ratio = report.ratio(m)
            text = f"{shown(median)} ms" + ("" if ratio is None else f", {ratio:.2f}x")
            axes.annotate(text, (upper, place), xytext=(5, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(rows)), [str(m.row) for m in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, _ROOM_FOR_TEXT * axes.get_xlim()[1])
        axes.set_xlabel("guided step, ms")
        baseline = report.baseline(batch)
        axes.set_title(f"batch {batch}" + ("" if baseline is None else f", x: speed of {baseline.row} = 1"))
    figure.suptitle(report.subject)
    shown_precisions = {m.row.precision for rows in panels.values() for m in rows}
    bars = [Patch(color=color, label=name) for name, color in _COLORS.items() if name in shown_precisions]
    machine, _ = machine_lines(report.machine)
    figure.legend(
        handles=[*bars, Line2D([], [], color="black", marker="|", label="quartiles")],
        loc="outside lower center",
        ncols=len(bars) + 1,
        fontsize=8,
        title=machine,
        title_fontsize=7,
    )
    return figure
