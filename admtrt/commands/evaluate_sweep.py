"""``admtrt evaluate sweep``: draw and judge samples for every combination of choices; table and figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from admtrt.commands.backend_report import BackendReport
from admtrt.commands.evaluate_samples import (
    FeatureNames,
    Floor,
    Json,
    Metrics,
    NoError,
    Parts,
    Seed,
    number,
)
from admtrt.commands.guide_options import interval_of
from admtrt.commands.options import BackendName, PlanFolder, Threads
from admtrt.commands.requirements import require
from admtrt.commands.solver_options import SolverOptions, method_option, takes_solver_options
from admtrt.console import Output, progress_bar, table
from admtrt.errors import RequestError
from admtrt.files import check_place
from admtrt.runtime.backends.default import DEFAULT_BACKEND
from admtrt.runtime.backends.names import OF_FEATURES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import RenderableType

    from admtrt.evaluate.sweep import Row

Item = TypeVar("Item")
_LISTED = "Comma list"
_SHORT = {
    "inception_score": "IS",
    "judge_score": "JS",
    "precision": "P",
    "recall": "R",
    "density": "dens.",
    "coverage": "cov.",
    "diversity": "div.",
    "accuracy": "acc.",
    "fid_infinity": "fid inf",
    "fd_infinity": "fd inf",
}
"""Short headings of the metrics, for a table that fits a terminal."""


@takes_solver_options
def sweep(
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    reference: Annotated[str, typer.Option(help="File of admtrt evaluate reference, or any images.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs, sweep.json and the figures.")],
    features: FeatureNames = None,
    scale: Annotated[str | None, typer.Option(help=f"{_LISTED} of guidance scales, e.g. 0,1,2,4.")] = None,
    method: Annotated[str | None, method_option(f"{_LISTED} of solvers")] = None,
    steps: Annotated[str | None, typer.Option(help=f"{_LISTED} of steps, e.g. 10,25 or ddim25.")] = None,
    precision: Annotated[str, typer.Option(help=f"{_LISTED} of fp32, bf16, fp16.")] = "fp32",
    guidance_interval: Annotated[
        str | None, typer.Option(help=f"{_LISTED} of LOW:HIGH or none, e.g. none,0.3:3.")
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Samples of each combination.")] = 2000,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples drawn at once.")] = 16,
    seed: Seed = 0,
    floor: Floor = None,
    metrics: Metrics = None,
    parts: Parts = None,
    no_error: NoError = False,
    backend: BackendName = DEFAULT_BACKEND,
    features_backend: Annotated[
        str, typer.Option(help=f"Backend of the features: {', '.join(OF_FEATURES)} or auto.")
    ] = "onnxruntime",
    threads: Threads = None,
    plans: PlanFolder = None,
    json: Json = False,
    *,
    solver_options: SolverOptions,
) -> None:
    """Draw and judge every combination of the choices: one table, sweep.json, and the figure of the paper.

    The reference is processed once, and every combination draws the same seeds. Solver options apply to every
    combination. An interrupted sweep continues.
    """
    require("matplotlib", extra="plot", purpose="The figure of a sweep")
    from admtrt.bundle import Bundle
    from admtrt.evaluate.compare import Asked, asked_metrics
    from admtrt.evaluate.extract import check_backend
    from admtrt.evaluate.figure import save_figure
    from admtrt.evaluate.judging import Computing, Evaluator
    from admtrt.evaluate.network import open_networks
    from admtrt.evaluate.sets import open_reference, open_set
    from admtrt.evaluate.sweep import RESULT, Sweep, labels_of, points, run_sweep
    from admtrt.runtime.backends.choice import BackendChoice
    from admtrt.runtime.pipeline import Pipeline

    output = Output(json=json)
    check_backend(features_backend, "fp32")
    precisions = _list(precision, "--precision", str) or ["fp32"]
    choices = {one: BackendChoice(backend, one, threads, plans) for one in precisions}  # type: ignore[arg-type]
    chosen = points(
        _list(method, "--method", str) or [None],
        _list(steps, "--steps", str) or [None],
        _list(scale, "--scale", _number) or [None],
        precisions,
        _list(guidance_interval, "--guidance-interval", _interval) or [None],
    )
    check_place(out, folder=True)
    networks = open_networks(features or [])
    if not networks:
        raise RequestError(
            "there are no features to see the samples with",
            hint="Give --features FOLDER of admtrt evaluate features, or --features NAME=FILE.onnx.",
        )
    asked = Asked(asked_metrics(metrics), metrics is not None, parts, not no_error, seed)
    theirs = open_reference(reference)
    real = None if floor is None else open_set(floor, "floor")
    opened = Bundle.open(bundle)
    found_backends = BackendReport(output)
    pipelines = {
        one: Pipeline.open(opened, choice.for_batches(min(batch_size, count)), progress=found_backends)
        for one, choice in choices.items()
    }
    labels = labels_of(count, opened.manifest.num_classes)
    swept = Sweep(pipelines, chosen, labels, count, seed, batch_size, solver_options)
    computing = Computing(features_backend, "fp32", threads, note=output.note)
    evaluators = [Evaluator(network, theirs, asked, computing, floor=real) for network in networks]
    about = {
        "bundle": opened.digest,
        "count": count,
        "seed": seed,
        "backend": backend,
        "reference": theirs.describe(),
        "floor": None if real is None else real.describe(),
    }
    with progress_bar("sweeping", swept.total()) as progress:
        rows = run_sweep(
            swept,
            evaluators,
            out,
            about,
            progress=progress,
            seen=lambda row: output.note(f"{row.point.name}: done"),
        )
    figures = [out / f"sweep-{network.name}.png" for network in networks]
    for index, figure in enumerate(figures):
        save_figure(rows, index, figure)
    output.result(
        {
            **about,
            "chosen": found_backends.to_list(),
            "rows": [row.to_dict() for row in rows],
            "files": [str(out / RESULT), *map(str, figures)],
        },
        *(_table(rows, index) for index in range(len(networks))),
        f"{out / RESULT}, {', '.join(map(str, figures))}",
    )
    for code, text in dict.fromkeys(
        (warned.code, f"{one.name}: {warned.text}")
        for row in rows
        for one in row.judged
        for warned in one.warnings
    ):
        output.note(f"{text} [{code}]")


def _table(rows: Sequence[Row], index: int) -> RenderableType:
    names = list(rows[0].judged[index].metrics)
    cells = []
    for row in rows:
        values = [row.judged[index].metrics[name] for name in names]
        cells.append(
            [row.point.name, f"{row.guided}/{row.evaluations}", *(number(v.value, v.error) for v in values)]
        )
    floor = rows[0].judged[index].floor
    if floor is not None:
        real = [floor[name] for name in names]
        cells.append(["real images", "", *(number(v.value, v.error) for v in real)])
    return table(
        f"features: {rows[0].judged[index].name}",
        ["combination", "guided", *(_SHORT.get(name, name) for name in names)],
        cells,
    )


def _list(text: str | None, option: str, read: Callable[[str], Item]) -> list[Item]:
    """The entries of a comma-separated list, without duplicates."""
    if text is None:
        return []
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entries):
        raise RequestError(f"there is an empty entry in {option} {text!r}")
    return list(dict.fromkeys(read(entry) for entry in entries))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"the scale {text!r} is no number", hint="Write e.g. --scale 0,1,2,4.") from None


def _interval(text: str) -> tuple[float, float] | None:
    return None if text == "none" else interval_of(text)
