"""The drift of the trajectories as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from admtrt.errors import MissingDependencyError
from admtrt.files import atomic_file

if TYPE_CHECKING:
    from pathlib import Path

    from admtrt.verify.report import VerificationReport

_FLOOR = 1e-9  # equal values have no place on a logarithmic axis


def require_plotting() -> None:
    """Make sure that :func:`plot_drift` can draw, before minutes are spent.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingDependencyError("matplotlib", extra="plot", purpose="A drift plot") from None


def plot_drift(report: VerificationReport, path: Path) -> None:
    """Write a PNG: the error of x_t after each step, for each sampler, with the tolerances.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
        OutputError: if the file cannot be written.
    """
    require_plotting()
    from matplotlib.figure import Figure

    # A figure of its own, without pyplot: no display, no global state.
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
    axes.set_ylabel("largest relative error of $x_t$")
    axes.set_title("Drift of the bundle from PyTorch")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
