"""``admtrt demo``: the complete workflow on real images, with a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admtrt.commands.requirements import require
from admtrt.console import Output, table


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the models, the bundle and the report.")] = Path(
        "demo"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Train an ADM and its classifier on digits, export, verify, sample, judge; exit 1 below the target."""
    require(
        "torch", "accelerate", "onnx", "onnxruntime", "sklearn", "matplotlib", extra="all", purpose="The demo"
    )
    from admtrt.demo.report import demo_numbers, write_report
    from admtrt.demo.run import SAMPLERS, TARGET, run_demo

    output = Output(json=json)
    result = run_demo(out, output=output)
    page = write_report(result, out)
    rows = [
        [
            best.sampler,
            f"{best.scale:g}",
            f"{best.verdict.accuracy:.1%}",
            f"{best.verdict.diversity:.2f}",
            *(f"{value.value:.3g}" for value in best.distances.values()),
        ]
        for best in map(result.best, SAMPLERS)
    ]
    output.result(
        demo_numbers(result) | {"report": str(page)},
        table(
            "best guidance scale", ("sampler", "scale", "judged their class", "diversity", "FD", "KID"), rows
        ),
        f"parity with PyTorch: {'passed' if result.verification.passed else 'FAILED'}",
        f"{'passed' if result.passed else 'FAILED'}: target {TARGET:.0%} in both samplers. Report: {page}",
    )
    if not result.passed:
        raise typer.Exit(1)
