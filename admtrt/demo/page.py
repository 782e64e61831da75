"""The page of the demo's report: one HTML file that holds its pictures and asks for nothing outside of it."""

from __future__ import annotations

import base64
import html
import platform
from typing import TYPE_CHECKING

from admtrt import __version__
from admtrt.demo.run import SAMPLERS, SAMPLES, TARGET, DemoResult, SweepPoint
from admtrt.installing import version_of
from admtrt.runtime.machine import available_threads, processor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from admtrt.evaluate.compare import Value

_SWEEP_COLUMNS = ("sampler", "scale", "judged their class", "diversity (real = 1)", "FD", "KID")
_PACKAGES = {
    "torch": "PyTorch",
    "onnx": "ONNX",
    "onnxscript": "ONNX Script",
    "onnxruntime": "ONNX Runtime",
    "scikit-learn": "scikit-learn",
    "numpy": "NumPy",
}
_STYLE = """
:root { color-scheme: light dark }
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
p { max-width: 46rem }
.pass { color: light-dark(#1a7f37, #4ac26b) }
.fail { color: light-dark(#b42318, #ff8b80) }
small, figcaption, footer { color: color-mix(in srgb, currentColor 65%, transparent); font-size: .9rem }
.fact, img, td, th, footer { border: 0 solid color-mix(in srgb, CanvasText 20%, transparent) }
.fact, img { border-width: 1px; border-radius: .5rem }
td, th { border-bottom-width: 1px }
.facts, .grids { display: grid; gap: 1rem }
.facts { grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); margin: 1.2rem 0 }
.fact { padding: .8rem 1rem; background: color-mix(in srgb, CanvasText 5%, transparent) }
.fact b { display: block; font-size: 1.7rem; line-height: 1.3 }
.fact small { display: block }
.grids { grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)) }
figure { margin: 1rem 0 }
.grids figure { margin: 0 }
img { display: block; max-width: 100%; background: #fff; padding: .4rem }
.scroll { overflow-x: auto }
.scroll img { min-width: 34rem }
.grids .scroll img { min-width: 0 }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .8rem; text-align: right; white-space: nowrap }
th { white-space: normal; vertical-align: bottom }
td:first-child, th:first-child { text-align: left; padding-left: 0 }
summary { cursor: pointer; padding: .3rem 0 }
footer { margin-top: 3rem; padding-top: 1rem; border-top-width: 1px }
"""


def page_of(result: DemoResult, out: Path) -> str:
    """The page as HTML, with the pictures that lie in ``out`` inside of it."""
    word = "passed" if result.passed else "failed"
    best = [result.best(method) for method in SAMPLERS]
    others = [point for point in result.points if point not in best]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>admtrt demo: {word}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>admtrt demo: {_judged(result.passed, word)}</h1>
<p>An unconditional ADM and a noisy classifier were trained on real digits of 8x8 pixels, exported as ONNX
graphs (the classifier as its input gradient), compared with PyTorch, and sampled without PyTorch.
{TARGET:.0%} of the samples of each sampler shall be judged to be the class that was asked for, at the
guidance scale that is best for it.</p>
{_facts(result, best)}
</header>
<h2>Samples at the best guidance scale</h2>
{_grids(best, out)}
<h2>Guidance: class accuracy against diversity</h2>
<p>{SAMPLES} samples of each sampler at each scale were judged by a support vector machine that was fitted on
{result.judge_images} real digits that neither network saw; it is {result.judge_accuracy:.1%} right on other
real digits. The best scale is that of the highest accuracy; the distances say what it costs.</p>
{_figure(out / "sweep.png", "A larger scale trades diversity for fidelity (figure 4 of the paper).")}
{_sweep(result)}
<p>FD and KID are distances from the networks' training images in the features of a classifier of clean images
that was trained for this. Real images are {result.floor["kid"].samples} that nobody learned from.</p>
{_figure(out / "quality.png", "Distances from the real digits, with errors; dashed: other real digits.")}
<h2>Samples at the other scales</h2>
{_grids(others, out)}
<h2>Parity with PyTorch</h2>
{_figure(out / "drift.png", "Relative difference between exported graphs and PyTorch after each step.")}
{_parity(result)}
<h2>Time</h2>
{_table(("stage", "seconds"), [[stage, f"{value:.0f}"] for stage, value in result.seconds.items()])}
<footer>{_footer()}</footer>
</body>
</html>
"""


def _judged(passed: bool, text: str) -> str:
    return f'<span class="{"pass" if passed else "fail"}">{html.escape(text)}</span>'


def _facts(result: DemoResult, best: Iterable[SweepPoint]) -> str:
    """The tiles of the verdict, one per figure."""
    rows = result.verification.rows
    errors = [row.error for row in rows if row.stage == "trajectory" and row.error is not None]
    parity = f"{len(rows) - len(result.verification.failures)} of {len(rows)}"
    drift = (
        f"whole samples: within {max(errors):.1e} of their largest value"
        if errors
        else "no whole sample was compared"
    )
    tiles = [
        (point.sampler, point.verdict.accuracy >= TARGET, f"{point.verdict.accuracy:.1%}", note)
        for point in best
        for note in [f"judged their class at scale {point.scale:g}; target {TARGET:.0%}"]
    ]
    tiles.append(("Checks against PyTorch", result.verification.passed, parity, drift))
    return (
        '<div class="facts">'
        + "".join(
            f'<div class="fact">{html.escape(name)}<b>{_judged(passed, value)}</b>'
            f"<small>{html.escape(note)}</small></div>"
            for name, passed, value, note in tiles
        )
        + "</div>"
    )


def _grids(points: Iterable[SweepPoint], out: Path) -> str:
    ordered = sorted(points, key=lambda point: point.scale)  # one scale of both samplers side by side
    figures = "".join(_figure(out / point.grid, point.summary) for point in ordered)
    return f'<div class="grids">{figures}</div>'


def _sweep(result: DemoResult) -> str:
    rows = [
        [
            point.sampler,
            f"{point.scale:g}",
            f"{point.verdict.accuracy:.1%}",
            f"{point.verdict.diversity:.2f}",
            *map(_shown, point.distances.values()),
        ]
        for point in result.points
    ]
    rows.append(["real images", "", "", "", *map(_shown, result.floor.values())])
    return _table(_SWEEP_COLUMNS, rows)


def _parity(result: DemoResult) -> str:
    rows = [
        [
            f"{row.stage}: {row.what}",
            "-" if row.error is None else f"{row.error:.2e}",
            "-" if row.tolerance is None else f"{row.tolerance:.0e}",
            row.status,
        ]
        for row in result.verification.rows
    ]
    is_open = "" if result.verification.passed else " open"
    table = _table(("check", "worst error", "tolerance", "status"), rows)
    return f"<details{is_open}><summary>All {len(rows)} checks</summary>{table}</details>"


def _footer() -> str:
    import torch
    from accelerate import PartialState

    device = PartialState().device  # which the trainings of this process took
    trained = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    versions = [f"admtrt {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {found}" for package, name in _PACKAGES.items() if (found := version_of(package))]
    machine = [processor(), f"{available_threads()} threads", platform.platform()]
    return (
        f"Trained on: {html.escape(trained)}. Sampled on: CPU, by ONNX Runtime.<br>"
        f"{html.escape(', '.join(machine))}.<br>{html.escape(', '.join(versions))}."
    )


def _shown(value: Value) -> str:
    number = "-" if value.value is None else f"{value.value:.3g}"
    return number if value.error is None else f"{number} ± {value.error:.1g}"


def _figure(picture: Path, caption: str) -> str:
    text, data = html.escape(caption), base64.b64encode(picture.read_bytes()).decode()
    image = f'<div class="scroll"><img src="data:image/png;base64,{data}" alt="{text}"></div>'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table>{row(header, "th")}{body}</table></div>'
