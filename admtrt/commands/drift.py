"""``admtrt drift``: how a backend or a precision changes a bundle's graphs and images."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from admtrt.commands.backend_report import BackendReport
from admtrt.commands.options import BackendName, PlanFolder, PrecisionName, Threads, steps_option
from admtrt.commands.requirements import require
from admtrt.console import Output, progress_bar, table
from admtrt.errors import RequestError
from admtrt.runtime.backends.default import DEFAULT_BACKEND

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rich.console import RenderableType

    from admtrt.bundle import Bundle
    from admtrt.runtime.backends.choice import BackendChoice
    from admtrt.runtime.sampler import Denoiser
    from admtrt.verify.drift import DriftReport


def drift(
    bundle: Annotated[Path, typer.Argument(help="The bundle's directory.")],
    backend: BackendName = DEFAULT_BACKEND,
    precision: PrecisionName = "fp32",
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="PRECISION",
            help="Measure the bundle's engine graphs of this precision in place of a backend: emulated on "
            "the CPU, every value rounded to its type.",
        ),
    ] = None,
    images: Annotated[int, typer.Option(help="Number of images to draw on each side.")] = 64,
    steps: Annotated[
        str | None,
        steps_option(
            "Steps of the trajectories, e.g. ddim25 or 100.  [default: ddim25; of processes without "
            "timesteps, the recommended sampler]"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images computed at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the first image.")] = 0,
    threads: Threads = None,
    plans: PlanFolder = None,
    plot: Annotated[Path | None, typer.Option(metavar="PATH.png", help="Write a plot of the errors.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure how far a backend or a precision differs from fp32 on ONNX Runtime, with the same seeds.

    Graphs are compared at the x_t of the fp32 trajectory. For trajectories and images, each side follows its
    own.
    """
    if images < 1 or batch_size < 1:
        raise RequestError(f"--images is {images}, --batch-size {batch_size}; expected at least 1 of each")
    if engine is None and (backend, precision) == (DEFAULT_BACKEND, "fp32"):
        raise _compared_with_itself()
    if engine is not None and (backend, precision, plans) != (DEFAULT_BACKEND, "fp32", None):
        raise RequestError(
            "--engine measures typed graphs on the CPU, --backend, --precision and --plans a backend",
            hint="Give one or the other.",
        )
    from admtrt.bundle import Bundle
    from admtrt.runtime.backends.choice import BackendChoice
    from admtrt.runtime.backends.onnxruntime import OnnxRuntimeDenoiser
    from admtrt.runtime.pipeline import Pipeline
    from admtrt.schedule.table import sampling_schedule
    from admtrt.verify.drift import drift_sampler, measure_drift

    if plot is not None:
        from admtrt.verify.plot import require_plotting

        require_plotting(plot)
    choice = BackendChoice(backend, precision, threads, plans)  # type: ignore[arg-type]
    output = Output(json=json)
    opened = Bundle.open(bundle)
    found = BackendReport(output)
    reference = OnnxRuntimeDenoiser(opened, threads=threads)
    sampler = drift_sampler(Pipeline(opened, reference), steps)
    length = len(sampling_schedule(opened.manifest.diffusion, sampler))
    if engine is None:
        what = str(choice)
        measured = _opened(opened, choice.for_batches(max(1, min(batch_size, images))), found)
    else:
        what, measured = f"engine graphs in {engine}, emulated", _emulated(opened, engine, threads)
    with measured as denoiser, progress_bar("measuring", images * length) as progress:
        report = measure_drift(
            opened,
            reference,
            denoiser,
            images=images,
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            progress=lambda count: progress(count, ""),
        )
    title = f"{opened.path.name}: {what} against fp32"
    output.result(
        {
            "bundle": str(opened.path),
            "backend": None if engine is not None else backend,
            "precision": engine or precision,
            "emulated": engine is not None,
            "chosen": found.to_list(),
            "sampling": sampler.steps,
            "seed": seed,
            **report.to_dict(),
        },
        *_shown(report, title),
    )
    if plot is not None:
        from admtrt.verify.drift_plot import plot_precision_drift

        plot_precision_drift(report, title, plot)


def _compared_with_itself() -> RequestError:
    return RequestError(
        "fp32 on onnxruntime is what the others are measured against",
        hint="Choose another --backend or --precision, or typed graphs with --engine.",
    )


def _opened(bundle: Bundle, choice: BackendChoice, found: BackendReport) -> AbstractContextManager[Denoiser]:
    from admtrt.runtime.backends.opening import open_denoiser

    denoiser = open_denoiser(bundle, choice, progress=found)
    if choice.precision == "fp32" and any(
        set(one.graphs.values()) == {DEFAULT_BACKEND} for one in found.found
    ):
        raise _compared_with_itself()
    return nullcontext(denoiser)


def _emulated(bundle: Bundle, engine: str, threads: int | None) -> AbstractContextManager[Denoiser]:
    from admtrt.contract import precision_named

    chosen = precision_named(engine, "--engine")
    require("onnx", "onnxscript", extra="export", purpose="Emulating engine graphs")
    from admtrt.verify.emulation import emulated

    bundle.graph_entry("unet", chosen)  # raises before any work
    return emulated(bundle, chosen, threads=threads)


def _shown(report: DriftReport, title: str) -> list[RenderableType]:
    graphs = [
        [
            graph.graph,
            f"{graph.first:.4g}-{graph.last:.4g}",
            f"{graph.mean_error:.2g}",
            f"{graph.max_error:.2g}",
            f"{graph.mean_cosine:.6f}",
            f"{graph.min_cosine:.6f}",
        ]
        for graph in report.graphs
    ]
    shown = sorted({0, len(report.steps) // 4, len(report.steps) // 2, len(report.steps) - 1})
    steps = [
        [
            f"{index + 1}",
            f"{step.sigma if step.timestep is None else step.timestep:.4g}",
            f"{step.mean_error:.2g}",
            f"{step.max_error:.2g}",
        ]
        for index, step in ((index, report.steps[index]) for index in shown)
    ]
    columns = ("graph", f"{report.axis}s", "mean error", "largest", "mean cosine", "smallest")
    return [
        table(title, columns, graphs),
        table("x_t of free trajectories", ("step", report.axis, "mean error", "largest"), steps),
        f"{report.images} images: PSNR {report.mean_psnr:.1f} dB on average, {report.min_psnr:.1f} dB at "
        f"least; a pixel differs by {report.max_levels:.1f} of 255 levels at most",
    ]
