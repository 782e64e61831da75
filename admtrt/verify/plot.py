"""Plot the drift of the trajectories."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from admtrt.errors import MissingDependencyError, OutputError
from admtrt.files import atomic_file, check_place

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from admtrt.verify.report import VerificationReport

_FLOOR = 1e-9  # shown instead of 0 on the logarithmic axis


def require_plotting(path: Path) -> None:
    """Check that a plot can be drawn and written, before minutes of work.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
        OutputError: if the path cannot be written, or has no suffix of a picture.
    """
    if path.suffix.lower() != ".png":
        raise OutputError(f"{path}: a plot is a PNG", hint="Name a file that ends in .png.")
    check_place(path)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingDependencyError("matplotlib", extra="plot", purpose="A drift plot") from None


def plot_drift(report: VerificationReport, path: Path) -> None:
    """Write a PNG of :func:`drift_figure`.

    Raises:
        OutputError: if the file cannot be written.
    """
    figure = drift_figure(report)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def drift_figure(report: VerificationReport) -> Figure:
    """The error of x_t after each step, for each sampler, with the tolerances."""
    from matplotlib.figure import Figure

    # A Figure without pyplot needs no display and no global state.
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, errors in report.drift.items():
        axes.semilogy(
            range(1, len(errors) + 1), [max(error, _FLOOR) for error in errors], marker="o", label=name
        )
    bounds = {row.tolerance for row in report.rows if row.stage == "trajectory" and row.tolerance is not None}
    for bound in sorted(bounds):
        axes.axhline(bound, color="black", linestyle="--", label=f"tolerance {bound:g}")
    axes.set_xlabel("steps taken")
    whole_numbers(axes.xaxis)
    axes.set_ylabel("largest relative error of $x_t$")
    axes.set_title("Drift of the bundle from PyTorch")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    return figure


def whole_numbers(axis: Any) -> None:
    """Tick an axis of matplotlib, of steps or timesteps, at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    # One step is one tick: two would have a fraction between them.
    axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
