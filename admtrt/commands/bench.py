"""``admtrt bench``: every way to run a bundle, side by side."""

from __future__ import annotations

import contextlib
import json as json_
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from admtrt.commands.options import PlanFolder
from admtrt.commands.requirements import require
from admtrt.console import Output, table
from admtrt.errors import RequestError
from admtrt.files import atomic_file, check_place

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType

    from admtrt.bench.report import BenchReport
    from admtrt.bench.rows import Row
    from admtrt.bench.subject import Subject


_REPEAT, _PAIRS, _AGAINST_STEPS = 7, 30, 5
_AGAINST_ROWS = ("onnxruntime", "openvino")


def bench(
    bundle: Annotated[Path | None, typer.Argument(help="The bundle's directory.")] = None,
    unet: Annotated[
        Path | None, typer.Option(help="Checkpoint of its UNet, for the rows that run in PyTorch.")
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="Checkpoint of its classifier, for the same rows.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Instead of a bundle: a published model with generated weights.")
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps a preset's bundle and the logs for further runs."),
    ] = None,
    original: Annotated[
        Path | None, typer.Option(help="Checkout of the original implementation, to measure it as well.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKOUT",
            help="Checkout of another version, with its own .venv: both draw the same samples in turn.",
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:PRECISION]",
            help="Row to measure: a backend, torch, torch-compile, plain-onnx or original; may be repeated. "
            "With --training: original, eager or admtrt[:PRECISION[+channels-last][+compile]]; with "
            "--features: a backend or torch-fidelity.",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Batch size; may be repeated. Default: 1; --training: the file's; --features: 16."),
    ] = None,
    repeat: Annotated[
        int | None,
        typer.Option(
            help="Timed steps of every row. Default: 7; 15 with --training or --features; with --against, "
            "30 pairs."
        ),
    ] = None,
    sampling: Annotated[
        int | None, typer.Option(metavar="STEPS", help="Also time a whole run of this many steps.")
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="Device of PyTorch's rows and of the measured peak.")
    ] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads of every row. Default: all.")] = None,
    plans: PlanFolder = None,
    training: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG.toml", help="Instead of a bundle: measure how fast this file's networks train."
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|NAME=FILE.onnx",
            help="Instead of a bundle: measure a network of admtrt evaluate features.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for bench.json, bench.md and the chart bench.png.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure guided steps on every backend and in PyTorch: speed, parity and memory of the same weights.

    With --training: images per second of training steps of admtrt, the original and a plain loop. With
    --features: images per second of a feature network on every library.

    Exit codes: 0 if at least one row was measured; 1 if none was, or if with --against one was slower.
    """
    from admtrt.bench.rows import ORIGINAL, default_rows, parse_rows, takes_plans
    from admtrt.bench.run import run_bench
    from admtrt.bench.subject import Subject, subject_from_preset
    from admtrt.contract import PRECISIONS
    from admtrt.runtime.backends.choice import checked_threads
    from admtrt.runtime.backends.registry import PLAN_BACKENDS
    from admtrt.runtime.machine import available_threads

    if sum(one is not None for one in (bundle, preset, training, features)) != 1:
        raise RequestError("give a bundle, --preset, --training or --features, and one of them only")
    if preset is not None and (unet is not None or classifier is not None or plans is not None):
        raise RequestError(
            "--unet, --classifier and --plans belong to a bundle; a preset has generated weights and no plans"
        )
    for name, value in (
        *(("--batch", size) for size in batch or ()),
        ("--repeat", repeat),
        ("--sampling", sampling),
    ):
        if value is not None and value < 1:
            raise RequestError(f"{name} is {value}; expected at least 1")
    checked_threads(threads)
    output = Output(json=json)
    if bundle is None and preset is None:
        given: dict[str, object] = {
            "--unet": unet, "--classifier": classifier, "--against": against, "--sampling": sampling,
            "--plans": plans,
        }  # fmt: skip
        if features is not None:
            given |= {"--original": original, "--device": None if device == "cpu" else device}
        unfit = [name for name, value in given.items() if value is not None]
        if unfit:
            mode = "--training" if features is None else "--features"
            raise RequestError(f"{unfit[0]} is nothing of {mode}", hint="Leave it out.")
        for folder in filter(None, (out, work)):
            check_place(folder, folder=True)
        if device == "cuda":
            _check_cuda()
        from admtrt.commands.bench_throughput import bench_features, bench_training

        with _scratch(work) as scratch:
            shared: dict[str, Any] = {
                "rows": backend or (), "batches": tuple(dict.fromkeys(batch or ())), "repeat": repeat,
                "threads": threads or available_threads(), "scratch": scratch, "out": out, "output": output,
            }  # fmt: skip
            if training is not None:
                measured = bench_training(training, original=original, device=device, **shared)
            else:
                assert features is not None  # one of the four is given
                measured = bench_features(features, **shared)
        if not measured:
            raise typer.Exit(1)
        return
    batches = tuple(dict.fromkeys(batch or (1,)))
    if backend or against is not None:
        rows = parse_rows(backend or _AGAINST_ROWS)
    else:
        rows = default_rows(device, original=original is not None)
    if original is not None and not any(row.name == ORIGINAL for row in rows):
        rows = (*parse_rows([ORIGINAL]), *rows)
    if plans is not None and not any(map(takes_plans, rows)):
        raise RequestError(
            f"no row runs plans, but {plans} was given as their folder",
            hint=f"Leave it out, or add --backend {' or '.join(PLAN_BACKENDS)}.",
        )
    if preset is not None:
        require("torch", "onnx", "onnxscript", "safetensors", extra="export", purpose="A preset's bundle")
    if unet is not None or classifier is not None:
        require("torch", "safetensors", extra="train", purpose="Reading checkpoints")
    if device == "cuda":
        _check_cuda()
    if out is not None:
        require("matplotlib", extra="plot", purpose="The chart of the bench")
        check_place(out, folder=True)
    if work is not None:
        check_place(work, folder=True)
    with _scratch(work) as scratch:
        if preset is not None:
            engines = PRECISIONS if device == "cuda" else ()
            subject = subject_from_preset(preset, scratch, original, output.note, engines=engines)
        else:
            assert bundle is not None  # one of the two is given
            subject = Subject(str(bundle), bundle, unet, classifier, original, scratch, plans)
        if against is not None:
            _compare(against, subject, rows, batches, repeat, sampling, threads, output)
            return
        report = run_bench(
            subject,
            rows,
            batches=batches,
            repeat=repeat or _REPEAT,
            device=device,
            threads=threads or available_threads(),
            sampling_steps=sampling,
            note=output.note,
        )
    if out is not None:
        _write(report, out)
    output.result(report.to_dict(), *_shown(report))
    if all(measurement.step is None for measurement in report.measurements):
        raise typer.Exit(1)


def _compare(
    checkout: Path,
    subject: Subject,
    rows: Sequence[Row],
    batches: tuple[int, ...],
    repeat: int | None,
    sampling: int | None,
    threads: int | None,
    output: Output,
) -> None:
    from admtrt.bench.against import COLUMNS, MOST, compare_with
    from admtrt.runtime.backends.registry import BACKENDS
    from admtrt.runtime.machine import available_threads

    other = next((row for row in rows if row.name not in BACKENDS), None)
    if other is not None:
        raise RequestError(f"row '{other}' is no backend", hint="Name backends with --backend.")
    steps = sampling or _AGAINST_STEPS
    found = compare_with(
        checkout,
        subject,
        rows,
        batches=batches,
        pairs=repeat or _PAIRS,
        steps=(str(steps), f"ddim{steps}"),
        threads=threads or available_threads(),
        note=output.note,
    )
    output.result(
        {"against": str(checkout), "comparisons": [one.to_dict() for one in found]},
        table(f"against {checkout}", list(COLUMNS), [one.cells() for one in found]),
    )
    if any(one.ratio > MOST for one in found):
        raise typer.Exit(1)


@contextlib.contextmanager
def _scratch(work: Path | None) -> Iterator[Path]:
    if work is not None:
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="admtrt-bench-") as folder:
        yield Path(folder)


def _check_cuda() -> None:
    require("torch", extra="train", purpose="--device cuda")
    import torch

    if not torch.cuda.is_available():
        raise RequestError(
            "PyTorch finds no CUDA device", hint="Leave out --device, or install a CUDA build of PyTorch."
        )


def _write(report: BenchReport, folder: Path) -> None:
    from admtrt.bench.chart import plot_steps

    with atomic_file(folder / "bench.json") as file:
        file.write_text(json_.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_file(folder / "bench.md") as file:
        file.write_text(report.markdown(), encoding="utf-8")
    plot_steps(report, folder / "bench.png")


def _shown(report: BenchReport) -> list[RenderableType]:
    from admtrt.bench.report import SPEED_COLUMNS

    shown: list[RenderableType] = []
    for batch in report.batches:
        shown.append(table(report.title(batch), ["row", *SPEED_COLUMNS], report.speed_cells(batch)))
        shown.append(table("what that takes", ["row", *report.cost_columns()], report.cost_cells(batch)))
        shown += report.remarks(batch)
    return [*shown, *report.footnotes()]
