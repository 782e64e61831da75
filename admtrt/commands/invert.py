"""``admtrt invert``: find the latents that DDIM decodes into given images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admtrt.commands.backend_report import BackendReport
from admtrt.commands.labels import requested_labels
from admtrt.commands.options import BackendName, PlanFolder, PrecisionName, Threads, steps_option
from admtrt.console import Output, progress_bar
from admtrt.runtime.backends.default import DEFAULT_BACKEND


def invert(
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    images: Annotated[
        Path, typer.Option(help="An .npz (arr_0, and labels as arr_1), an image or a folder of them.")
    ],
    out: Annotated[Path, typer.Option(help="Directory of the run; an interrupted run continues there.")],
    classes: Annotated[
        str | None, typer.Option(help="Classes of the images, as for sample. Default: the file's labels.")
    ] = None,
    steps: Annotated[str, steps_option("Of ddim, e.g. ddim100 or 250.")] = "ddim100",
    levels: Annotated[
        int | None, typer.Option(help="Number of steps to go up. Default: all but one.")
    ] = None,
    clip: Annotated[
        bool,
        typer.Option("--clip/--no-clip", help="Bound x_0 to [-1, 1]. The reconstruction is then not exact."),
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images computed at once, and kept in one file.")] = 16,
    backend: BackendName = DEFAULT_BACKEND,
    precision: PrecisionName = "fp32",
    threads: Threads = None,
    plans: PlanFolder = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Invert images to latents (latents.npz) for sample --latents, and report the reconstruction error."""
    from admtrt.bundle import Bundle
    from admtrt.contract import event_shape
    from admtrt.runtime.backends.choice import BackendChoice
    from admtrt.runtime.bulk import recorded_shard_size
    from admtrt.runtime.images_in import read_images
    from admtrt.runtime.inversion import InversionRequest, finished_images, invert_into
    from admtrt.runtime.pipeline import Pipeline

    output = Output(json=json)
    choice = BackendChoice(backend, precision, threads, plans)  # type: ignore[arg-type]
    opened = Bundle.open(bundle)
    given, own_labels = read_images(images, event_shape(opened.manifest.network), "--images")
    labels = None if own_labels is None else own_labels.tolist()
    if classes is not None:
        labels = requested_labels(classes, len(given), opened.manifest)
    elif opened.manifest.num_classes is None:
        labels = None
    found_backends = BackendReport(output)
    choice = choice.for_batches(max(1, min(batch_size, len(given))))
    pipeline = Pipeline.open(opened, choice, progress=found_backends)
    request = InversionRequest.checked(
        pipeline,
        given,
        labels,
        steps=steps,
        levels=levels,
        clip=clip,
        batch_size=batch_size,
        shard_size=recorded_shard_size(out),
    )
    both_ways = 2 * len(request.schedule) + 1
    done = finished_images(request, out)
    with progress_bar("inverting", len(request) * both_ways, done=done * both_ways) as progress:
        path, errors = invert_into(request, out, progress)
    found = {"mean": float(errors.mean()), "worst": float(errors.max())}
    average, worst = (f"{error * 127.5:.2f}" for error in found.values())
    output.result(
        {
            "images": len(request),
            "continued_from": done,
            "files": [str(path)],
            "levels": len(request.schedule),
            "steps": request.sampler.steps,
            "clip": clip,
            "round_trip": found,
            "backend": backend,
            "precision": precision,
            "chosen": found_backends.to_list(),
        },
        f"{len(request)} image{'s' * (len(request) > 1)} to level {len(request.schedule)} of "
        f"{request.sampler.steps!r}: {path}; and back, a pixel is off by {average} levels of 255 on average "
        f"({worst} in the worst image)",
    )
