"""``admtrt verify``: compare a bundle with the checkpoints that it was exported from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from admtrt.commands.backend_report import BackendReport
from admtrt.commands.options import (
    BackendName,
    ClassifierPreset,
    ClassifierSet,
    ClassifierWeights,
    NullClass,
    PlanFolder,
    SettingsFile,
    Threads,
    UnetPreset,
    UnetSet,
    UnetWeights,
)
from admtrt.commands.requirements import require
from admtrt.console import Output, table
from admtrt.files import check_place
from admtrt.runtime.backends.default import DEFAULT_BACKEND

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from admtrt.verify.report import Row, VerificationReport


def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle's directory.")],
    unet: Annotated[Path, typer.Option(help="Checkpoint of the UNet or upsampler that was exported.")],
    classifier: Annotated[
        Path | None, typer.Option(help="Checkpoint of the noisy classifier, if the bundle has one.")
    ] = None,
    unet_preset: UnetPreset = None,
    classifier_preset: ClassifierPreset = None,
    config: SettingsFile = None,
    unet_set: UnetSet = None,
    classifier_set: ClassifierSet = None,
    unet_weights: UnetWeights = None,
    classifier_weights: ClassifierWeights = None,
    null_class: NullClass = None,
    guide: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GUIDE", help="A guide, given as for the export; guides without a file may be omitted."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Steps of the compared trajectories. Default: 10, or all of a shorter process."),
    ] = None,
    all_solvers: Annotated[
        bool,
        typer.Option(
            "--all-solvers",
            help="Compare every solver and option, instead of ddpm, ddim and one with memory.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the inputs and the noise.")] = 0,
    backend: BackendName = DEFAULT_BACKEND,
    threads: Threads = None,
    plans: PlanFolder = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="PATH.png", help="Write a plot of the drift after every step.")
    ] = None,
    polygraphy: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Save every graph's inputs and PyTorch's outputs for `polygraphy run`.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare a bundle with its PyTorch checkpoints: graphs, steps, whole samples, images.

    In fp32 on any backend; use `admtrt drift` to measure a lower precision. Exit codes: 0 all within
    tolerance, 1 not, 3 a graph cannot be loaded, 4 a graph fails when run.
    """
    from admtrt.bundle import Bundle
    from admtrt.commands.checkpoints import load_pair
    from admtrt.runtime.backends.choice import BackendChoice

    require("torch", "safetensors", extra="export", purpose="Verification")
    from admtrt.export.guides.named import guides_named
    from admtrt.verify.plot import plot_drift, require_plotting
    from admtrt.verify.stages import verify_bundle

    if plot is not None:
        require_plotting(plot)
    choice = BackendChoice(backend, "fp32", threads, plans)
    recorder = None
    if polygraphy is not None:
        require("polygraphy", extra="debug", purpose="--polygraphy")
        from admtrt.verify.record import Recorder

        check_place(polygraphy, folder=True)
        recorder = Recorder(polygraphy)
    output = Output(json=json)
    opened = Bundle.open(bundle, memo=False)
    generator, noisy = load_pair(
        unet,
        classifier,
        unet_preset=unet_preset,
        classifier_preset=classifier_preset,
        config=config,
        unet_set=unet_set or (),
        classifier_set=classifier_set or (),
        unet_weights=unet_weights,
        classifier_weights=classifier_weights,
        null_class=null_class,
        note=output.note,
    )
    found = BackendReport(output)
    report = verify_bundle(
        opened,
        generator,
        noisy,
        guides=guides_named(guide or (), generator),
        steps=steps,
        every=all_solvers,
        seed=seed,
        backend=choice,
        progress=lambda name: output.note(f"verifying {name}"),
        backend_progress=found,
        record=None if recorder is None else recorder.add,
    )
    saved = [] if recorder is None else recorder.write()
    data = {
        **report.to_dict(),
        "seed": seed,
        "backend": backend,
        "chosen": found.to_list(),
        "saved": list(map(str, saved)),
    }
    output.result(data, *_shown(report, backend))
    if plot is not None and report.drift:
        plot_drift(report, plot)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _shown(report: VerificationReport, backend: str) -> list[RenderableType]:
    from rich.text import Text

    columns = ["stage", "what", "worst error", "tolerance", "at", "result"]
    title = f"{report.bundle} on {backend} against its checkpoints"
    made = table(title, columns, [_cells(row) for row in report.rows])
    details = [Text(f"{row.stage}, {row.what}: {row.detail}") for row in report.rows if row.detail]
    failed = len(report.failures)
    verdict = (
        "passed" if report.passed else f"FAILED ({report.outcome}): {failed} of {len(report.rows)} checks"
    )
    return [made, *details, Text(verdict, style="green" if report.passed else "bold red")]


def _cells(row: Row) -> list[str | Text]:
    from rich.text import Text

    error = "" if row.error is None else f"{row.error:.2g}"
    tolerance = "" if row.tolerance is None else f"{row.tolerance:g}"
    result = "pass" if row.status == "pass" else Text(f"FAIL: {row.status}", style="bold red")
    return [row.stage, row.what, error, tolerance, "" if row.where is None else str(row.where), result]
