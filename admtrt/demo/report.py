"""The demo's report: the numbers as JSON, the pictures, and one page that holds them all."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from admtrt.demo.page import page_of
from admtrt.demo.run import SAMPLERS, SAMPLES, TARGET, DemoResult
from admtrt.evaluate.figure import save_figure
from admtrt.files import atomic_file
from admtrt.verify.plot import plot_drift

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure


def demo_numbers(result: DemoResult) -> dict[str, Any]:
    """Everything the demo measured, as plain data."""
    return {
        "passed": result.passed,
        "target": TARGET,
        "samples": SAMPLES,
        "judge": {"accuracy": result.judge_accuracy, "images": result.judge_images},
        "best": {method: _point(result, method) for method in SAMPLERS},
        "sweep": [
            {
                "method": point.method,
                "steps": point.row.sampler.steps,
                "scale": point.scale,
                "accuracy": point.verdict.accuracy,
                "diversity": point.verdict.diversity,
                **{name: value.to_dict() for name, value in point.distances.items()},
            }
            for point in result.points
        ],
        "floor": {name: value.to_dict() for name, value in result.floor.items()},
        "verification": result.verification.to_dict(),
        "seconds": {stage: round(value, 1) for stage, value in result.seconds.items()},
    }


def _point(result: DemoResult, method: str) -> dict[str, Any]:
    best = result.best(method)
    return {
        "scale": best.scale,
        "accuracy": best.verdict.accuracy,
        "diversity": best.verdict.diversity,
        **{name: value.value for name, value in best.distances.items()},
    }


def write_report(result: DemoResult, out: Path) -> Path:
    """Write ``report.html``, ``report.json`` and the plots into ``out``, which has the grids of the sweep."""
    plot_drift(result.verification, out / "drift.png")
    with atomic_file(out / "sweep.png") as temporary:
        sweep_figure(result).savefig(temporary, format="png", dpi=110)
    save_figure([point.row for point in result.points], 0, out / "quality.png")
    with atomic_file(out / "report.json") as temporary:
        temporary.write_text(json.dumps(demo_numbers(result), indent=1), encoding="utf-8")
    page = out / "report.html"
    with atomic_file(page) as temporary:
        temporary.write_text(page_of(result, out), encoding="utf-8")
    return page


def sweep_figure(result: DemoResult) -> Figure:
    """Class accuracy against the guidance scale and against diversity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_scale, trade_off = figure.subplots(1, 2)
    # The curves fall and nearly meet: the scales of one stand above it, those of the other below.
    for method, offset in zip(SAMPLERS, ((5, 5), (-5, -13)), strict=True):
        points = [point for point in result.points if point.method == method]
        accuracy = [point.verdict.accuracy for point in points]
        diversity = [point.verdict.diversity for point in points]
        by_scale.plot([point.scale for point in points], accuracy, marker="o", label=points[0].sampler)
        (line,) = trade_off.plot(diversity, accuracy, marker="o")
        for point, x, y in zip(points, diversity, accuracy, strict=True):
            trade_off.annotate(
                f"{point.scale:g}",
                (x, y),
                textcoords="offset points",
                xytext=offset,
                ha="center",
                color=line.get_color(),
                fontsize=8,
            )
    by_scale.axhline(TARGET, color="grey", linestyle=":", label="target")
    by_scale.set(xlabel="guidance scale", ylabel="judged their class", ylim=(0, 1.1))
    trade_off.set(xlabel="diversity (real = 1)", title="each point: its guidance scale", ylim=(0, 1.1))
    for axes in (by_scale, trade_off):
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        axes.grid(visible=True, alpha=0.3)
    by_scale.legend()
    return figure
