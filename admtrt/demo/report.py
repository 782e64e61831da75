"""The demo's report: an HTML page, its pictures, and the same numbers as JSON."""

from __future__ import annotations

import html
import json
import platform
from typing import TYPE_CHECKING, Any

from admtrt import __version__
from admtrt.demo.run import SAMPLERS, SAMPLES, TARGET, DemoResult
from admtrt.evaluate.figure import save_figure
from admtrt.files import atomic_file
from admtrt.verify.plot import plot_drift

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from admtrt.evaluate.compare import Value

_SWEEP_COLUMNS = ("sampler", "scale", "judged their class", "diversity (real = 1)", "FD", "KID")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .75rem; text-align: right }
th { border-bottom: 1px solid #888 } td:first-child, th:first-child { text-align: left }
figure { margin: 1.5rem 0 } img { max-width: 100% } figcaption { color: #555 }
.pass { color: #1a7f37 } .fail { color: #b42318 }
"""


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
    """Write ``report.html``, ``report.json`` and the pictures into ``out``."""
    plot_drift(result.verification, out / "drift.png")
    _plot_sweep(result, out / "sweep.png")
    save_figure([point.row for point in result.points], 0, out / "quality.png")
    with atomic_file(out / "report.json") as temporary:
        temporary.write_text(json.dumps(demo_numbers(result), indent=1), encoding="utf-8")
    page = out / "report.html"
    with atomic_file(page) as temporary:
        temporary.write_text(_page(result), encoding="utf-8")
    return page


def _page(result: DemoResult) -> str:
    verdict = (
        '<strong class="pass">passed</strong>' if result.passed else '<strong class="fail">failed</strong>'
    )
    best = "; ".join(
        f"{method.upper()} {steps}: {point.verdict.accuracy:.1%} at scale {point.scale:g}"
        for method, steps in SAMPLERS.items()
        for point in [result.best(method)]
    )
    sweep = [
        [
            f"{point.method.upper()} {point.row.sampler.steps}",
            f"{point.scale:g}",
            f"{point.verdict.accuracy:.1%}",
            f"{point.verdict.diversity:.2f}",
            *(_shown(value) for value in point.distances.values()),
        ]
        for point in result.points
    ]
    sweep.append(["real images", "", "", "", *(_shown(value) for value in result.floor.values())])
    parity = [
        [
            f"{row.stage}: {row.what}",
            "-" if row.error is None else f"{row.error:.2e}",
            "-" if row.tolerance is None else f"{row.tolerance:.0e}",
            row.status,
        ]
        for row in result.verification.rows
    ]
    seconds = [[stage, f"{value:.0f}"] for stage, value in result.seconds.items()]
    figures = "".join(_figure(name, caption) for name, caption in result.grids.items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>admtrt demo</title><style>{_STYLE}</style>
<h1>admtrt demo: {verdict}</h1>
<p>An unconditional ADM and a noisy classifier were trained on the 8x8 digits, exported as ONNX graphs (the
classifier as its input gradient), verified against PyTorch, and sampled without PyTorch. {SAMPLES} samples at
each setting were judged by a support vector machine fitted on {result.judge_images} real digits that neither
network saw; it is {result.judge_accuracy:.1%} right on other real digits. The target is {TARGET:.0%}.
Best: {best}.</p>
<h2>Guidance: class accuracy against diversity</h2>
{_figure("sweep.png", "A larger scale trades diversity for fidelity (figure 4 of the paper).")}
{_figure("quality.png", "Distances from the real digits, with their errors; dashed: other real digits.")}
{_table(_SWEEP_COLUMNS, sweep)}
<p>FD and KID are distances from the networks' training images in the features of a classifier of clean images
that was trained for this; real images are {result.floor["kid"].samples} that nobody learned from. The best
scale is that of the highest accuracy; the distances say what it costs.</p>
<h2>Samples</h2>
{figures}
<h2>Parity with PyTorch</h2>
{_table(("stage", "worst error", "tolerance", "status"), parity)}
{_figure("drift.png", "Relative difference between the exported graphs and PyTorch after each step.")}
<h2>Time</h2>
{_table(("stage", "seconds"), seconds)}
<p>admtrt {__version__}, Python {platform.python_version()}, {html.escape(platform.machine())}.</p>
</html>
"""


def _shown(value: Value) -> str:
    number = "-" if value.value is None else f"{value.value:.3g}"
    return number if value.error is None else f"{number} ± {value.error:.1g}"


def _figure(name: str, caption: str) -> str:
    text = html.escape(caption)
    return f'<figure><img src="{html.escape(name)}" alt="{text}"><figcaption>{text}</figcaption></figure>\n'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + row(header, "th") + "".join(row(cells, "td") for cells in rows) + "</table>"


def _plot_sweep(result: DemoResult, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_scale, trade_off = figure.subplots(1, 2)
    for method, steps in SAMPLERS.items():
        points = [point for point in result.points if point.method == method]
        accuracy = [point.verdict.accuracy for point in points]
        diversity = [point.verdict.diversity for point in points]
        label = f"{method.upper()} {steps}"
        by_scale.plot([point.scale for point in points], accuracy, marker="o", label=label)
        trade_off.plot(diversity, accuracy, marker="o", label=label)
        for point, x, y in zip(points, diversity, accuracy, strict=True):
            trade_off.annotate(
                f"{point.scale:g}", (x, y), textcoords="offset points", xytext=(4, -10), fontsize=8
            )
    by_scale.axhline(TARGET, color="grey", linestyle=":", label="target")
    by_scale.set(xlabel="guidance scale", ylabel="judged their class", ylim=(0, 1.02))
    trade_off.set(xlabel="diversity (real = 1)", ylabel="judged their class", ylim=(0, 1.02))
    by_scale.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
