"""``admtrt sample``: draw images from a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from admtrt.commands.backend_report import BackendReport
from admtrt.commands.guide_options import GuideOptions, interval_of, takes_guide_options
from admtrt.commands.image_options import ImageOptions, takes_image_options
from admtrt.commands.labels import requested_labels
from admtrt.commands.options import BackendName, PlanFolder, PrecisionName, Threads, steps_option
from admtrt.commands.solver_options import SolverOptions, method_option, takes_solver_options
from admtrt.console import Output, progress_bar
from admtrt.errors import RequestError
from admtrt.runtime.backends.default import DEFAULT_BACKEND

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from admtrt.bundle import Manifest
    from admtrt.commands.image_options import ReadImages
    from admtrt.runtime.backends.choice import BackendChoice
    from admtrt.runtime.bulk import BulkRequest, Elsewhere, Format
    from admtrt.runtime.conditioning import SmallImages
    from admtrt.runtime.pipeline import Pipeline
    from admtrt.runtime.slots import Labels
    from admtrt.runtime.two_stage import TwoStage
    from admtrt.schedule.sampler import SamplerConfig

_FORMATS = ("npz", "png", "grid", "gif")


@takes_guide_options
@takes_image_options
@takes_solver_options
def sample(
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    out: Annotated[Path, typer.Option(help="Directory of the run; an interrupted run continues there.")],
    num: Annotated[
        int | None,
        typer.Option(help="Number of samples; the requested classes alternate. Default: one of each class."),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Classes by number or name, e.g. 0,3,7; or with counts, e.g. 0:10,3:5."),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the first sample; further samples count up from it.")
    ] = 0,
    steps: Annotated[
        str | None,
        steps_option("Steps of ddpm and ddim, e.g. 250, ddim25 or 90,60,60,20,20; else evaluations."),
    ] = None,
    method: Annotated[str | None, method_option("Solver")] = None,
    scale: Annotated[float | None, typer.Option(help="Guidance scale; 0 = unguided.")] = None,
    clip: Annotated[bool | None, typer.Option("--clip/--no-clip", help="Bound x_0 to [-1, 1].")] = None,
    guidance_interval: Annotated[
        str | None,
        typer.Option(
            metavar="LOW:HIGH",
            help="Guide only at noise levels in this interval, e.g. 0.3:5; sigma = sqrt(1 / alpha_bar - 1).",
        ),
    ] = None,
    low_res: Annotated[
        Path | None,
        typer.Option(help="Upsampler: .npz with small images (arr_0 uint8 [N,H,W,C]) and labels (arr_1)."),
    ] = None,
    upsample: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", help="Enlarge the samples with this upsampler: a second stage."),
    ] = None,
    upsample_steps: Annotated[
        str | None, steps_option("Steps of the second stage. Default: its bundle's.")
    ] = None,
    upsample_scale: Annotated[
        float | None, typer.Option(help="Guidance scale of the second stage. Default: 0.")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="npz, png, grid or gif (the steps of the first 16); may be repeated. Default: npz and grid.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples computed at once; at most the shard size.")] = 16,
    shard_size: Annotated[
        int | None,
        typer.Option(help="Samples per intermediate file. Default: one batch."),
    ] = None,
    backend: BackendName = DEFAULT_BACKEND,
    precision: PrecisionName = "fp32",
    threads: Threads = None,
    plans: PlanFolder = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Draw on the machines of this Ray cluster (auto, HOST:PORT), or on this one (local); all "
            "must see the folder of --out.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    *,
    solver_options: SolverOptions,
    image_options: ImageOptions,
    guide_options: GuideOptions,
) -> None:
    """Draw guided or unguided samples from a bundle, without PyTorch."""
    from admtrt.bundle import Bundle
    from admtrt.runtime.backends.choice import AUTO, BackendChoice
    from admtrt.runtime.bulk import LOW_STAGE, MAX_SAMPLES, BulkRequest, recorded_shard_size
    from admtrt.runtime.conditioning import read_small_images
    from admtrt.runtime.pipeline import Pipeline
    from admtrt.runtime.shards import Shards

    output = Output(json=json)
    chosen = _formats(formats)
    kept = (recorded_shard_size(out) or batch_size) if shard_size is None else shard_size
    if upsample is None and (upsample_steps is not None or upsample_scale is not None):
        raise RequestError(
            "--upsample-steps and --upsample-scale belong to a second stage", hint="Name it with --upsample."
        )
    interval = None if guidance_interval is None else interval_of(guidance_interval)
    found_backends = BackendReport(output)

    choice = BackendChoice(backend, precision, threads, plans)  # type: ignore[arg-type]
    if ray is not None and choice.name == AUTO:
        raise RequestError(
            "--backend auto chooses for one machine", hint="Name the backend that all machines are to use."
        )

    def elsewhere(pipeline: Pipeline) -> Elsewhere | None:
        return None if ray is None else _on_cluster(pipeline, ray, choice)

    first = Bundle.open(bundle)
    small = None if low_res is None else read_small_images(low_res, first, most=MAX_SAMPLES)
    if small is not None and num not in (None, len(small)):
        raise RequestError(f"{low_res} holds {len(small)} images, --num says {num}", hint="Leave --num out.")
    guide_options.check()
    guided_by = guide_options.choices(first.manifest, bundle)
    mask = image_options.mask if image_options.known is None and guide_options.names else None
    targets = guide_options.targets(first.manifest, mask).checked(first.manifest, guided_by or ())
    images = image_options.read(first.manifest, num, targets, own_mask=mask is None)
    source = images if small is None else small
    asked = _asked_labels(classes, num, source, first.manifest)
    count = next((len(given) for given in (asked, source) if given is not None), num or 1)
    choice = choice.for_batches(max(1, min(batch_size, kept, count)))
    pipeline = Pipeline.open(first, choice, guides=guide_options.names, progress=found_backends)
    sampler = pipeline.sampler(
        **image_options.choices(
            images,
            {
                "steps": steps,
                "method": method,
                "scale": scale,
                "clip": clip,
                "guidance_interval": interval,
                "guided_by": guided_by,
                **solver_options,  # type: ignore[typeddict-item]
            },
        )
    )
    inputs = image_options.checked(images, targets, pipeline, sampler, output.note)
    pipeline.check_low_res(None if small is None else small.images[:1])
    request = BulkRequest(
        count=count,
        labels=_labels(asked, source, pipeline, sampler),
        first_seed=seed,
        sampler=sampler,
        batch_size=batch_size,
        shard_size=kept,
        low_res=None if small is None else small.images,
        inputs=inputs,
    )
    if guide_options.names:
        evaluations = count * len(inputs.schedule(first.manifest.diffusion, sampler))
        output.note(guide_options.cost(first.manifest, evaluations))
    if upsample is None:
        if request.labels is not None and not _uses_labels(first.manifest, sampler):
            output.note("the labels have no effect: the UNet knows no classes, at scale 0 nothing guides it")
        result = _draw_one(pipeline, request, out, chosen, elsewhere(pipeline))
    else:
        from admtrt.runtime.two_stage import UNGUIDED, TwoStage

        second = Pipeline.open(
            Bundle.open(upsample), choice, guides=guide_options.names, progress=found_backends
        )
        stages = TwoStage(pipeline, second)
        upsampler = stages.high.sampler(
            steps=upsample_steps, scale=UNGUIDED if upsample_scale is None else upsample_scale
        )
        places = (elsewhere(stages.low), elsewhere(stages.high))
        result = _draw_two(stages, request, upsampler, out, chosen, places)
    place = out if upsample is None else out / LOW_STAGE
    shards = Shards(place, request, first.manifest)
    result["files"] += image_options.differences(images, shards, place, grid="grid" in chosen)
    output.result(
        {
            "samples": request.count,
            **result,
            "first_seed": seed,
            "backend": backend,
            "precision": precision,
            "chosen": found_backends.to_list(),
        },
        f"{request.count} sample{'s' * (request.count > 1)}: " + ", ".join(result["files"]),
    )


def _on_cluster(pipeline: Pipeline, address: str, choice: BackendChoice) -> Elsewhere:
    """Let a Ray cluster draw the shards of a run."""
    from admtrt.cluster.tasks import spread
    from admtrt.runtime.backends.registry import BACKENDS
    from admtrt.runtime.shard_work import ShardWork, Source

    on_cpu = BACKENDS[choice.name].device == "cpu"

    def elsewhere(request: BulkRequest, directory: Path, starts: Sequence[int]) -> Iterable[int]:
        source = Source(
            bundle=pipeline.bundle.path.resolve(),
            digest=pipeline.bundle.digest,
            backend=choice.name,
            precision=choice.precision,
            threads=choice.threads or (1 if on_cpu else None),
            plans=None if choice.plans is None else choice.plans.resolve(),
            batch_size=min(request.batch_size, request.shard_size, request.count),
        )
        work = ShardWork(source, request, directory.resolve())
        cpus, gpus = choice.threads or 1, 0 if on_cpu else 1
        return spread(work, starts, address=address, cpus=cpus, gpus=gpus) if starts else ()

    return elsewhere


def _draw_one(
    pipeline: Pipeline,
    request: BulkRequest,
    out: Path,
    formats: list[Format],
    elsewhere: Elsewhere | None = None,
) -> dict[str, Any]:
    from admtrt.runtime.bulk import draw, sample_steps
    from admtrt.runtime.shards import Shards

    done, steps = Shards(out, request, pipeline.bundle.manifest).finished, _steps(pipeline, request)
    with progress_bar("sampling", sample_steps(pipeline, request, formats), done=done * steps) as progress:
        written = draw(pipeline, request, out, formats, progress=progress, elsewhere=elsewhere)
    return _outcome(request, done, written)


def _draw_two(
    stages: TwoStage,
    low: BulkRequest,
    upsampler: SamplerConfig,
    out: Path,
    formats: list[Format],
    elsewhere: tuple[Elsewhere | None, Elsewhere | None],
) -> dict[str, Any]:
    from admtrt.runtime.bulk import LOW_STAGE, sample_steps
    from admtrt.runtime.shards import Shards
    from admtrt.runtime.two_stage import draw_two_stage, second_request

    high = second_request(stages, low, upsampler, out)
    done = (
        Shards(out / LOW_STAGE, low, stages.low.bundle.manifest).finished,
        Shards(out, high, stages.high.bundle.manifest).finished,
    )
    steps = (_steps(stages.low, low), _steps(stages.high, high))
    finished = done[0] * steps[0] + done[1] * steps[1]
    total = sample_steps(stages.low, low, formats) + sample_steps(stages.high, high, formats)
    with progress_bar("sampling", total, done=finished) as progress:
        first, second = draw_two_stage(
            stages, low, high, out, formats, progress=progress, elsewhere=elsewhere
        )
    return _outcome(high, done[1], second) | {"first_stage": _outcome(low, done[0], first)}


def _steps(pipeline: Pipeline, request: BulkRequest) -> int:
    return len(request.inputs.schedule(pipeline.bundle.manifest.diffusion, request.sampler))


def _outcome(request: BulkRequest, done: int, written: list[Path]) -> dict[str, Any]:
    return {
        "continued_from": done,
        "files": [str(path) for path in written],
        "sampler": request.sampler.to_dict(),
    }


def _asked_labels(
    classes: str | None, num: int | None, images: SmallImages | ReadImages | None, manifest: Manifest
) -> list[int] | None:
    """The label of each sample from the command line; None if labels come from the images or are absent.

    Raises:
        RequestError: as :func:`requested_labels`.
    """
    if images is None:
        return requested_labels(classes, num, manifest)
    if classes is None:
        return None
    return requested_labels(classes, len(images) if len(images) > 1 else num, manifest)


def _uses_labels(manifest: Manifest, sampler: SamplerConfig) -> bool:
    """True if the UNet or any guide uses the samples' classes."""
    from admtrt.schedule.guides import LABELLED

    labelled = any(manifest.guides[choice.name].loss in LABELLED for choice in sampler.guided_by)
    return manifest.network.num_classes is not None or bool(sampler.scale) or labelled


def _labels(
    asked: list[int] | None,
    images: SmallImages | ReadImages | None,
    pipeline: Pipeline,
    sampler: SamplerConfig,
) -> Labels | None:
    """The checked label of each sample: as requested, else from the images.

    Raises:
        RequestError: as :meth:`Pipeline.check_labels`.
    """
    if asked is not None or images is None:
        return pipeline.check_labels(asked, sampler)
    if pipeline.bundle.manifest.num_classes is None:
        return images.labels  # only stored with the images
    return pipeline.check_labels(None if images.labels is None else images.labels.tolist(), sampler)


def _formats(given: list[str] | None) -> list[Format]:
    chosen: list[Format] = []
    for one in given or ["npz", "grid"]:
        if one not in _FORMATS:
            raise RequestError(f"format {one!r} is unknown; expected one of {', '.join(_FORMATS)}")
        if one not in chosen:
            chosen.append(one)  # type: ignore[arg-type]
    return chosen
