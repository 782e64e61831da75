"""Plot the drift from float32 along the trajectories, and of each graph over the timesteps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from admtrt.files import atomic_file
from admtrt.verify.plot import whole_numbers

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from admtrt.verify.drift import DriftReport

_FLOOR = 1e-9  # shown instead of 0 on the logarithmic axis


def plot_precision_drift(report: DriftReport, title: str, path: Path) -> None:
    """Write a PNG of :func:`precision_drift_figure`.

    Raises:
        OutputError: if the file cannot be written.
    """
    figure = precision_drift_figure(report, title)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def precision_drift_figure(report: DriftReport, title: str) -> Figure:
    """Mean and largest error of x_t after each step; of each graph by range of timesteps or noise levels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    along, across = figure.subplots(1, 2)
    count = range(1, len(report.steps) + 1)
    for label, errors in (
        ("largest", [step.max_error for step in report.steps]),
        ("mean", [step.mean_error for step in report.steps]),
    ):
        along.semilogy(count, [max(error, _FLOOR) for error in errors], marker="o", label=label)
    along.set_xlabel("steps taken")
    whole_numbers(along.xaxis)
    along.set_ylabel("relative error of $x_t$")
    for name in dict.fromkeys(graph.graph for graph in report.graphs):
        bins = [graph for graph in report.graphs if graph.graph == name]
        even = report.axis == "timestep"
        middle = [
            (graph.first + graph.last) / 2 if even else math.sqrt(graph.first * graph.last) for graph in bins
        ]
        across.semilogy(middle, [max(g.mean_error, _FLOOR) for g in bins], marker="o", label=name)
    across.set_xlabel(report.axis)
    if report.axis == "noise level":
        across.set_xscale("log")
    else:
        whole_numbers(across.xaxis)
    across.set_ylabel("mean relative error of the output")
    for axes in (along, across):
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    return figure
