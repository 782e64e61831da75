"""``admtrt bench --training`` and ``--features``: images per second of training steps and of features."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from admtrt.commands.requirements import require
from admtrt.config_files import load_config
from admtrt.console import Output, table
from admtrt.errors import ConfigError, RequestError
from admtrt.files import atomic_file
from admtrt.run_config import RunConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from admtrt.bench.rows import Device
    from admtrt.bench.throughput import ThroughputReport
    from admtrt.run_config import Task

_REPEAT = 15
_IMAGES = 16  # batch size, the default of `admtrt evaluate`
_TASKS: tuple[Task, ...] = ("unet", "classifier")


def bench_training(
    file: Path,
    *,
    original: Path | None,
    rows: Sequence[str],
    batches: Sequence[int],
    repeat: int | None,
    device: Device,
    threads: int,
    scratch: Path,
    out: Path | None,
    output: Output,
) -> bool:
    """Measure the UNet and the classifier of a training file; False if no row could be measured.

    Raises:
        ConfigError: if the file describes neither.
        RequestError: for an unknown row.
    """
    require("torch", "accelerate", "safetensors", extra="train", purpose="Training")
    import torch

    from admtrt.bench.subject import check_original
    from admtrt.bench.throughput import Measuring
    from admtrt.bench.training import (
        ORIGINAL,
        default_training_rows,
        parse_training_rows,
        run_training_bench,
    )

    check_original(original)
    config = load_config(RunConfig, file)
    tasks = [task for task in _TASKS if config.network(task) is not None]
    if not tasks:
        raise ConfigError(f"{file} has neither a section [unet] nor [classifier]")
    bf16 = device == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001
    chosen = (
        parse_training_rows(rows) if rows else default_training_rows(original=original is not None, bf16=bf16)
    )
    if (original is None) == any(row.name == ORIGINAL for row in chosen):
        raise RequestError(
            "the row 'original' and --original belong together",
            hint="Give the checkout with --original CHECKOUT, and the row with --backend original or no row.",
        )
    how = Measuring(repeat or _REPEAT, device, threads, scratch, output.note)
    reports = []
    for task in tasks:
        section = f"train_{task}"
        for batch in batches or [getattr(config, section).batch_size]:
            changed = {section: getattr(config, section).model_copy(update={"batch_size": batch})}
            report = run_training_bench(
                config.model_copy(update=changed),
                task,
                chosen,
                how,
                original=original,
            )
            reports.append(report)
    return _show(reports, {"file": str(file)}, out, output)


def bench_features(
    features: str,
    *,
    rows: Sequence[str],
    batches: Sequence[int],
    repeat: int | None,
    threads: int,
    scratch: Path,
    out: Path | None,
    output: Output,
) -> bool:
    """Measure a feature network on every library; False if no row could be measured.

    Raises:
        RequestError: if it is not a feature network, or for an unknown row.
    """
    from admtrt.bench.feature_rows import feature_rows, run_feature_bench
    from admtrt.bench.throughput import Measuring
    from admtrt.evaluate.network import open_network

    network = open_network(features)
    chosen = feature_rows(rows, network)
    how = Measuring(repeat or _REPEAT, "cpu", threads, scratch, output.note)
    reports = [run_feature_bench(network, chosen, how, batch=batch) for batch in batches or [_IMAGES]]
    return _show(reports, {"features": network.name, "sha256": network.digest}, out, output)


def _show(
    reports: Sequence[ThroughputReport], about: dict[str, str], out: Path | None, output: Output
) -> bool:
    """Write and print; False if nothing was measured."""
    from admtrt.bench.throughput import COLUMNS

    found = {**about, "reports": [report.to_dict() for report in reports]}
    if out is not None:
        with atomic_file(out / "bench.json") as path:
            path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        with atomic_file(out / "bench.md") as path:
            path.write_text("\n".join(report.markdown() for report in reports), encoding="utf-8")
    shown = []
    for report in reports:
        shown += [table(report.subject, ["row", *COLUMNS], report.cells()), *report.footnotes()]
    output.result(found, *shown)
    return any(one.step is not None for report in reports for one in report.measurements)
