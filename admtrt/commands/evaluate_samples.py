"""``admtrt evaluate reference`` and ``samples``: make reference statistics, and measure samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from admtrt.commands.options import Threads
from admtrt.console import Output, progress_bar, table
from admtrt.errors import AdmtrtError, RequestError
from admtrt.files import check_place
from admtrt.runtime.backends.names import OF_FEATURES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from admtrt.evaluate.judging import Computing, Judged
    from admtrt.evaluate.network import FeatureNetwork
    from admtrt.evaluate.sets import OpenedSet

FeatureNames = Annotated[
    list[str] | None,
    typer.Option(
        "--features",
        metavar="FOLDER|NAME=FILE.onnx",
        help="Folder of admtrt evaluate features, or any ONNX file of uint8 images; may be repeated.",
    ),
]
FeatureBackend = Annotated[
    str, typer.Option("--backend", help=f"{', '.join(OF_FEATURES)}, or auto for the fastest.")
]
FeaturePrecision = Annotated[
    str, typer.Option("--precision", help="fp32; bf16 on openvino, with what it changes.")
]
FeatureBatch = Annotated[int, typer.Option("--batch-size", min=1, help="Images computed at once.")]
Metrics = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        help="Comma list of fid, sfid, is, precision, recall, kid, density, coverage, "
        "diversity, accuracy, fid-infinity. Default: all but the last.",
    ),
]
Parts = Annotated[
    int | None,
    typer.Option("--parts", min=1, help="Number of splits of the IS. Default: splits of 5,000 images."),
]
NoError = Annotated[bool, typer.Option("--no-error", help="Skip the slow error estimate of FID.")]
Floor = Annotated[
    str | None,
    typer.Option(
        "--floor", metavar="DATA", help="Real images outside the reference, measured by the same metrics."
    ),
]
Lossy = Annotated[bool, typer.Option("--lossy", help="Accept JPEG files, too.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of every random choice.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def reference(
    data: Annotated[str, typer.Argument(help="Folder, .npz, IDX file, digits, or CONFIG.toml[:PART].")],
    features: Annotated[str, typer.Option(metavar="FOLDER|NAME=FILE.onnx", help="The network of features.")],
    out: Annotated[Path, typer.Option(help="The .npz file to write.")],
    size: Annotated[
        int | None, typer.Option(min=1, help="Crop to squares of this size, as training does.")
    ] = None,
    keep: Annotated[
        int, typer.Option(min=2, help="Images to keep for precision and recall, drawn by the seed.")
    ] = 10_000,
    backend: FeatureBackend = "onnxruntime",
    precision: FeaturePrecision = "fp32",
    threads: Threads = None,
    batch_size: FeatureBatch = 16,
    lossy: Lossy = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Write statistics of all images of a set, and some of the images, in the ADM evaluator's format."""
    from admtrt.evaluate.images import open_images
    from admtrt.evaluate.judging import Computing
    from admtrt.evaluate.network import open_network
    from admtrt.evaluate.reference import write_reference

    output = Output(json=json)
    check_place(out)
    if out.suffix != ".npz":
        raise RequestError(f"--out is {out}; expected a name that ends in .npz")
    network = open_network(features)
    images = open_images(data, size=size, lossy=lossy)
    computing = Computing(backend, precision, threads, batch_size, output.note)
    with progress_bar("features", len(images)) as progress:
        written = write_reference(images, network, computing, out, keep=keep, seed=seed, progress=progress)
    output.result(
        {"file": str(out), **written},
        f"{out}: statistics of {written['images']} images, {written['kept']} of them kept",
    )


def samples(
    source: Annotated[
        str, typer.Argument(help="A run's folder (while it draws, too), .npz, folder of PNG, or features.")
    ],
    reference: Annotated[str, typer.Option(help="File of admtrt evaluate reference, or any images.")],
    features: FeatureNames = None,
    backend: FeatureBackend = "onnxruntime",
    precision: FeaturePrecision = "fp32",
    threads: Threads = None,
    batch_size: FeatureBatch = 16,
    count: Annotated[
        int | None, typer.Option(min=1, help="Number of samples, drawn by the seed. Default: all.")
    ] = None,
    seed: Seed = 0,
    metrics: Metrics = None,
    parts: Parts = None,
    floor: Floor = None,
    nearest: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Training images in which to find each sample's nearest one."),
    ] = None,
    no_error: NoError = False,
    lossy: Lossy = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the picture of the nearest pairs.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Compute the features of a run's samples on the machines of this Ray cluster (auto, "
            "HOST:PORT), or on this one (local); all must see the run's folder.",
        ),
    ] = None,
    self_check: Annotated[
        bool,
        typer.Option(
            "--self-check",
            help="Check the result against the published numbers of the published ImageNet-256 batch.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Measure samples: FID, sFID, IS, precision, recall, KID, density, coverage, without PyTorch."""
    from admtrt.evaluate.compare import Asked, asked_metrics
    from admtrt.evaluate.extract import check_backend
    from admtrt.evaluate.judging import Computing, Evaluator
    from admtrt.evaluate.network import open_networks
    from admtrt.evaluate.published import self_check as check_published
    from admtrt.evaluate.sets import check_networks, open_reference, open_set

    output = Output(json=json)
    check_backend(backend, precision)
    if plot is not None:
        if nearest is None:
            raise RequestError(
                "--plot shows the nearest pairs", hint="Name the training images with --nearest."
            )
        check_place(plot, folder=True)
    asked = Asked(asked_metrics(metrics), metrics is not None, parts, not no_error, seed)
    networks = open_networks(features or [])
    opened = open_set(source, "samples", lossy=lossy, count=count, seed=seed)
    check_networks(opened, networks)
    theirs = open_reference(reference, lossy=lossy)
    real = None if floor is None else open_set(floor, "floor", lossy=lossy)
    training = None if nearest is None else open_set(nearest, "training images", lossy=lossy)
    computing = Computing(backend, precision, threads, batch_size, output.note)
    seen: list[FeatureNetwork | None] = [*networks] or [None]
    evaluators = [
        Evaluator(network, theirs, asked, computing, floor=real, training=training) for network in seen
    ]
    if ray is not None:
        _on_cluster(opened, networks, computing, ray, count=count, seed=seed)
    with progress_bar("evaluating", sum(one.total(opened) for one in evaluators)) as progress:
        results = [one(opened, progress=progress) for one in evaluators]
    data: dict[str, Any] = {
        "samples": opened.describe(),
        "reference": theirs.describe(),
        "floor": None if real is None else real.describe(),
        "seed": seed,
        "features": [result.to_dict() for result in results],
    }
    if plot is not None and training is not None:
        _save_pairs(results[0], opened, training, plot)
    shown: list[RenderableType] = [item for result in results for item in shown_result(result)]
    if self_check:
        checked = check_published(results[0].metrics)
        data["self_check"] = checked
        shown.append(_shown_check(checked))
    output.result(data, *shown)
    for result in results:
        for warned in result.warnings:
            output.note(f"{result.name}: {warned.text} [{warned.code}]")
    if self_check and not data["self_check"]["passed"]:
        raise AdmtrtError(
            "the published numbers are not met",
            hint=f"They hold for {data['self_check']['batch']}, with --features of the published weights.",
        )


def _on_cluster(
    opened: OpenedSet,
    networks: Sequence[FeatureNetwork],
    computing: Computing,
    address: str,
    *,
    count: int | None,
    seed: int,
) -> None:
    """Let a cluster compute the samples' features and store them where the evaluation reads them."""
    from admtrt.evaluate.elsewhere import block_work, computed_elsewhere

    works = [block_work(opened, network, computing, count=count, seed=seed) for network in networks]
    with progress_bar("features", len(opened) * len(works)) as progress:
        for work, network in zip(works, networks, strict=True):
            for images in computed_elsewhere(work, address):
                progress(images, network.name)


def shown_result(result: Judged) -> list[RenderableType]:
    """A table of the metrics and, if requested, of the nearest training images."""
    columns = ["metric", "value", "samples", "reference"]
    if result.floor is not None:
        columns.append("real images")
    rows = []
    for name, value in result.metrics.items():
        row = [name, number(value.value, value.error), str(value.samples), str(value.reference or "")]
        if result.floor is not None:
            real = result.floor.get(name)
            row.append("" if real is None else number(real.value, real.error))
        rows.append(row)
    title = f"features: {result.name}" + ("" if result.protocol is None else f" ({result.protocol})")
    if result.precision_change is not None:
        rows.append(
            [f"change of the distance by {result.about['precision']}", f"{result.precision_change:+.4g}"]
        )
    shown: list[RenderableType] = [table(title, columns, rows)]
    if result.nearest is not None:
        near = result.nearest.to_dict()
        rows = [["median distance to the nearest training image", f"{near['median']:.4g}"]]
        rows.append(["equal to a training image", str(near["equal"])])
        if near["share_below"] is not None:
            rows.append(["nearer than 99% of the real images", f"{near['share_below']:.1%} (1% is usual)"])
        shown.append(table(f"{near['training']} training images", ["quantity", "value"], rows))
    return shown


def number(value: float | None, error: float | None) -> str:
    """A metric and its standard error, for tables."""
    if value is None:
        return "-"
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _shown_check(checked: dict[str, Any]) -> RenderableType:
    rows = [
        [
            name,
            number(row["value"], None),
            f"{row['expected']:.4f} ± {row['tolerance']:.3f}",
            "yes" if row["passed"] else "NO",
        ]
        for name, row in checked["metrics"].items()
    ]
    return table(checked["batch"], ["metric", "found", "published", "agrees"], rows)


def _save_pairs(result: Judged, opened: Any, training: Any, folder: Path) -> None:
    from admtrt.evaluate.nearest import save_pairs

    if result.nearest is not None and opened.images is not None and training.images is not None:
        save_pairs(result.nearest, opened.images, training.images, folder / "nearest.png")
