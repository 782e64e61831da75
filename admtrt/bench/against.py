"""Compare with another checkout of admtrt: the same samples of the same weights, in interleaved pairs.

Each side exports the checkpoints itself and draws in a process of its own environment, through the public
``Pipeline``. Pairs are measured in the order ABBA, so that drifts of the machine's speed favour neither side.
Both processes are restarted every few pairs: the memory layout that a process happens to get changes its
speed by more than the 1% to be measured.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import admtrt
from admtrt.bundle import Bundle
from admtrt.errors import AdmtrtError, ConfigError, RequestError
from admtrt.schedule.sampler import with_choices
from admtrt.schedule.table import sampling_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from admtrt.bench.rows import Row
    from admtrt.bench.subject import Subject

MOST = 1.01
"""Largest median ratio of seconds (ours / theirs) that does not count as a slowdown."""
PAIRS_PER_PROCESS = 5
"""Pairs drawn before both processes are restarted."""
_DRIVER = """
import json, sys, time
from admtrt import Pipeline
bundle, backend, precision, threads, batch, steps = json.loads(sys.argv[1])
pipeline = Pipeline.from_bundle(
    bundle, backend=backend, precision=precision, threads=threads, batch_size=batch
)
classes = pipeline.bundle.manifest.num_classes
labels = None if classes is None else [index % classes for index in range(batch)]
def draw():
    start = time.perf_counter()
    pipeline(labels, list(range(batch)), steps=steps, batch_size=batch)
    return time.perf_counter() - start
draw()
print(draw(), flush=True)
for _ in sys.stdin:
    print(draw(), flush=True)
"""


@dataclass(frozen=True)
class Comparison:
    """One row at one batch size.

    Attributes:
        row: backend and precision.
        batch: batch size.
        steps: steps of every draw, as given to the samplers.
        ours, theirs: seconds of every draw, in pairs.
    """

    row: str
    batch: int
    steps: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """The ratio of seconds (ours / theirs) of each pair."""
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        """The median ratio."""
        return median(self.ratios)

    def cells(self) -> list[str]:
        """One table row for people."""
        low, _, high = quantiles(self.ratios, n=4)
        return [
            f"{self.row}, batch {self.batch}, {self.steps}",
            f"{median(self.ours):.4g} s",
            f"{median(self.theirs):.4g} s",
            f"{self.ratio:.4f} ({low:.4f} to {high:.4f})",
            str(len(self.ours)),
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {**asdict(self), "ratio": self.ratio}


COLUMNS = ("row", "this version", "the other", "ratio (quartiles)", "pairs")


def compare_with(
    checkout: Path,
    subject: Subject,
    rows: Sequence[Row],
    *,
    batches: Sequence[int],
    pairs: int,
    steps: Sequence[str],
    threads: int,
    note: Callable[[str], None],
) -> list[Comparison]:
    """Measure this version and another.

    Args:
        checkout: the other version's checkout, with its environment in ``.venv``.
        subject: the checkpoints that both export.
        rows: backends.
        batches: sizes.
        pairs: pairs of draws per row and size.
        steps: numbers of steps of a draw; each is measured.
        threads: threads of CPU backends.
        note: called with progress messages.

    Raises:
        RequestError: if the checkout has no environment, the subject has no checkpoints, or its process does
            not have the steps.
        AdmtrtError: if a side fails.
    """
    if subject.unet is None:
        raise RequestError(
            "--against exports on both sides, and needs the checkpoints", hint="Give --unet, or --preset."
        )
    sides = [_Side("this version", Path(admtrt.__file__).parents[1], Path(sys.executable))]
    python = checkout / ".venv" / "bin" / "python"
    if not python.exists():
        raise RequestError(
            f"{checkout} has no environment: {python} is missing", hint="Make one there: make test"
        )
    sides.append(_Side("the other", checkout.resolve(), python.absolute()))
    bundles = []
    for side, name in zip(sides, ("ours", "theirs"), strict=True):
        note(f"exporting with {side.name}")
        bundles.append(side.export(subject, subject.scratch / f"{name}.bundle"))
        if side is sides[0]:
            _check_steps(bundles[0], steps)
    found = []
    for row in rows:
        for batch in batches:
            for text in steps:
                request = [row.name, row.precision, threads, batch, text]
                note(f"{row}, batch {batch}, {text}: {pairs} pairs")
                ours, theirs = interleaved(
                    [
                        functools.partial(side.drawing, [str(bundle), *request])
                        for side, bundle in zip(sides, bundles, strict=True)
                    ],
                    pairs,
                )
                found.append(Comparison(str(row), batch, text, tuple(ours), tuple(theirs)))
    return found


def _check_steps(bundle: Path, steps: Sequence[str]) -> None:
    """Refuse impossible steps before spending minutes on the others."""
    manifest = Bundle.open(bundle).manifest
    for text in steps:
        try:
            sampling_schedule(
                manifest.diffusion, with_choices(manifest.sampler, manifest.diffusion, {"steps": text})
            )
        except ConfigError as error:
            raise RequestError(error.message, hint=error.hint) from None


@dataclass(frozen=True)
class _Side:
    """A version of admtrt: its folder and its Python."""

    name: str
    folder: Path
    python: Path

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.folder)}

    def export(self, subject: Subject, path: Path) -> Path:
        """Export the subject's checkpoints, unless done already."""
        if path.exists():
            return path
        guide = [] if subject.classifier is None else ["--classifier", str(subject.classifier.resolve())]
        command = [str(self.python), "-m", "admtrt", "export", str(subject.unet and subject.unet.resolve())]
        done = subprocess.run(  # noqa: S603 - the user names the checkout
            [*command, *guide, "--out", str(path.resolve())],
            cwd=self.folder, env=self._environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise AdmtrtError(f"{self.name} cannot export: {done.stderr.strip()}")
        return path.resolve()

    @contextlib.contextmanager
    def drawing(self, request: list[Any]) -> Iterator[Callable[[], float]]:
        """A warmed-up process that draws once per call and returns the seconds."""
        command = [str(self.python), "-c", _DRIVER, json.dumps(request)]
        with subprocess.Popen(  # noqa: S603 - as above
            command, cwd=self.folder, env=self._environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None

            def seconds() -> float:
                line = process.stdout.readline() if process.stdout is not None else ""
                if not line:
                    reason = process.stderr.read().strip() if process.stderr is not None else ""
                    raise AdmtrtError(f"{self.name} cannot draw: {reason}")
                return float(line)

            def draw() -> float:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                return seconds()

            try:
                seconds()
                yield draw
            finally:
                process.stdin.close()
                process.kill()


def interleaved(
    openings: Sequence[Callable[[], contextlib.AbstractContextManager[Callable[[], float]]]], pairs: int
) -> list[list[float]]:
    """Seconds of every draw of both sides, restarting the processes every ``PAIRS_PER_PROCESS`` pairs."""
    seconds: list[list[float]] = [[], []]
    for first in range(0, pairs, PAIRS_PER_PROCESS):
        order = (0, 1) if first // PAIRS_PER_PROCESS % 2 == 0 else (1, 0)
        with contextlib.ExitStack() as stack:
            drawers = {side: stack.enter_context(openings[side]()) for side in order}
            for pair in range(first, min(first + PAIRS_PER_PROCESS, pairs)):
                for side in (0, 1) if pair % 2 == 0 else (1, 0):
                    seconds[side].append(drawers[side]())
    return seconds
