"""Training speed in images per second: our training step, the original's, and a plain PyTorch loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from admtrt.bench.throughput import Measuring, ThroughputReport, ThroughputRow, measure_rows
from admtrt.contract import PRECISIONS
from admtrt.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from admtrt.contract import Precision
    from admtrt.run_config import RunConfig, Task

ADMTRT, EAGER, ORIGINAL = "admtrt", "eager", "original"
_SWITCHES = ("channels-last", "compile")


@dataclass(frozen=True)
class TrainingRow:
    """One way to train.

    Attributes:
        name: ``admtrt``, ``eager`` or ``original``.
        given: True if the row states precision and switches; without them, ``admtrt`` uses the file's.
        precision: precision of the networks.
        switches: some of :data:`_SWITCHES`, in their order.
    """

    name: str
    given: bool = False
    precision: Precision = "fp32"
    switches: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ":".join([self.name, *(["+".join((self.precision, *self.switches))] if self.given else [])])


def parse_training_rows(items: Sequence[str]) -> tuple[TrainingRow, ...]:
    """Parse rows of the form ``NAME`` or ``NAME:PRECISION[+channels-last][+compile]``.

    Raises:
        RequestError: for an unknown name, precision or switch, or a repeated row.
    """
    rows = [_parse(item) for item in items]
    for row in rows:
        if rows.count(row) > 1:
            raise RequestError(f"the row {row} comes twice")
    return tuple(rows)


def _parse(item: str) -> TrainingRow:
    name, colon, rest = item.partition(":")
    if name not in (ADMTRT, EAGER, ORIGINAL):
        raise RequestError(
            f"there is no way to train called '{name}'", hint=f"There are: {ADMTRT}, {EAGER}, {ORIGINAL}."
        )
    if not colon:
        return TrainingRow(name)
    first, *switches = rest.split("+")
    precision = next((one for one in PRECISIONS if one == first), None)
    unknown = [one for one in switches if one not in _SWITCHES]
    if precision is None or unknown:
        raise RequestError(
            f"the row {item!r} cannot be read",
            hint=f"Write NAME:PRECISION, of {', '.join(PRECISIONS)}, and then +{' or +'.join(_SWITCHES)}.",
        )
    if name != ADMTRT and (switches or (name == ORIGINAL and precision != "fp32")):
        raise RequestError(f"the row {item!r}: {name} trains as it does", hint=f"Leave it at {name}.")
    return TrainingRow(name, True, precision, tuple(one for one in _SWITCHES if one in switches))


def default_training_rows(*, original: bool, bf16: bool) -> tuple[TrainingRow, ...]:
    """The original if available, the plain loop, ours with the file's settings, ours in each precision."""
    rows = [
        *([ORIGINAL] if original else []),
        EAGER,
        ADMTRT,
        "admtrt:fp32",
        "admtrt:fp32+channels-last+compile",
    ]
    if bf16:
        rows += ["admtrt:bf16", "admtrt:bf16+channels-last+compile"]
    return parse_training_rows(rows)


def fixed(config: RunConfig, task: Task, row: TrainingRow) -> RunConfig:
    """The configuration with the settings of a row."""
    section = f"train_{task}"
    settings = getattr(config, section)
    changes: dict[str, Any] = {"accumulate": 1}
    if row.given:
        changes |= {
            "precision": row.precision,
            "channels_last": "channels-last" in row.switches,
            "compile": "compile" in row.switches,
        }
    return config.model_copy(update={section: settings.model_copy(update=changes)})


def run_training_bench(
    config: RunConfig,
    task: Task,
    rows: Sequence[TrainingRow],
    how: Measuring,
    *,
    original: Path | None,
) -> ThroughputReport:
    """Measure rows; speeds are relative to the first row.

    Args:
        config: configuration of the run; images are generated, so no data are needed.
        task: which network of the configuration to train.
        rows: ways to train.
        how: settings of the measurement.
        original: checkout of the original implementation, for its row.
    """
    from admtrt.bench.training_rows import Trainer

    settings = getattr(config, f"train_{task}")
    network = config.network(task)
    assert network is not None  # refused before
    return measure_rows(
        f"{task} of {config.data.image_size}x{config.data.image_size}, batch {settings.batch_size}",
        [
            ThroughputRow(
                str(row),
                row.precision if row.given or row.name != ADMTRT else settings.precision,
                Trainer,
                (row, config, task, original, how.scratch, how.device, how.threads),
            )
            for row in rows
        ],
        how,
        batch=settings.batch_size,
        counted=network,
    )
