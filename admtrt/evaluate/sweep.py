"""A sweep: samples of a bundle under every combination of choices, each drawn once and judged."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.evaluate.images import drawn_images
from admtrt.evaluate.sets import OpenedSet
from admtrt.files import atomic_file
from admtrt.runtime.bulk import BulkRequest, draw
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.shards import Shards
from admtrt.schedule.table import sampling_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from admtrt.evaluate.judging import Evaluator, Judged, Progress
    from admtrt.schedule.sampler import SamplerConfig

RESULT = "sweep.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Point:
    """One combination; None is the bundle's recommendation.

    Attributes:
        method, steps, scale: of the sampler.
        precision: of the networks.
        guidance_interval: noise levels that are guided; None guides all.
    """

    method: str | None
    steps: str | None
    scale: float | None
    precision: str
    guidance_interval: tuple[float, float] | None

    @property
    def name(self) -> str:
        """For people and for the folder of the run."""
        interval = self.guidance_interval
        parts = [
            self.method or "method",
            "steps" if self.steps is None else f"steps{self.steps}",
            "scale" if self.scale is None else f"scale{self.scale:g}",
            self.precision,
            "" if interval is None else f"sigma{interval[0]:g}to{interval[1]:g}",
        ]
        return "-".join(part for part in parts if part)


def points(
    methods: Sequence[str | None],
    steps: Sequence[str | None],
    scales: Sequence[float | None],
    precisions: Sequence[str],
    intervals: Sequence[tuple[float, float] | None],
) -> list[Point]:
    """The product of the choices; at scale 0 nothing is guided, and an interval makes no second point."""
    every = (
        Point(method, step, scale, precision, None if scale == 0 else interval)
        for method, step, scale, precision, interval in itertools.product(
            methods, steps, scales, precisions, intervals
        )
    )
    return list(dict.fromkeys(every))


@dataclass(frozen=True, eq=False)
class Row:
    """A point and what came of it.

    Attributes:
        point: the combination.
        sampler: that it means for the bundle.
        evaluations: of the network, a sample.
        judged: by each set of features.
    """

    point: Point
    sampler: SamplerConfig
    evaluations: int
    judged: list[Judged]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.point.name,
            **asdict(self.point),
            "sampler": self.sampler.to_dict(),
            "evaluations": self.evaluations,
            "features": [one.to_dict() for one in self.judged],
        }


@dataclass(frozen=True, eq=False)
class Sweep:
    """Axes of a sweep.

    Attributes:
        pipelines: of the bundle, by precision.
        points: the combinations.
        labels: class of each sample; None where the bundle knows no classes.
        count, seed: samples of each point, and the first's seed: the same noise everywhere.
        batch_size: samples computed at once, and kept in one file.
        options: of the solver, by name, the same for every point.
    """

    pipelines: dict[str, Pipeline]
    points: Sequence[Point]
    labels: Sequence[int] | None
    count: int
    seed: int
    batch_size: int
    options: Mapping[str, Any]

    def request(self, point: Point) -> BulkRequest:
        """Request of one point.

        Raises:
            RequestError: if the bundle cannot do it.
        """
        pipeline = self.pipelines[point.precision]
        sampler = pipeline.sampler(
            steps=point.steps,
            method=point.method,
            scale=point.scale,
            guidance_interval=point.guidance_interval,
            **self.options,
        )
        return BulkRequest(
            count=self.count,
            labels=pipeline.check_labels(self.labels, sampler),
            first_seed=self.seed,
            sampler=sampler,
            batch_size=self.batch_size,
            shard_size=self.batch_size,
        )

    def evaluations(self, point: Point) -> int:
        """Evaluations of the network for a sample of a point: the rows of its schedule."""
        manifest = self.pipelines[point.precision].bundle.manifest
        return len(sampling_schedule(manifest.diffusion, self.request(point).sampler))

    def total(self) -> int:
        """Sample-steps of all points."""
        return self.count * sum(self.evaluations(point) for point in self.points)


def run_sweep(
    sweep: Sweep,
    evaluators: Sequence[Evaluator],
    out: Path,
    about: dict[str, Any],
    *,
    progress: Progress,
    seen: Callable[[Row], None] = lambda _: None,
) -> list[Row]:
    """Draw and judge every point; ``sweep.json`` is complete up to the last one that is done.

    What is drawn and every feature is kept in a folder for each point: the same command goes on after a kill.

    Args:
        sweep: what is drawn.
        evaluators: judge it.
        out: the folder.
        about: what the results are of, for ``sweep.json``.
        progress: called with the sample-steps done.
        seen: called with each row.

    Raises:
        RequestError: if a point is impossible, before anything is drawn.
        OutputError: if a folder holds another run, or a shard that is damaged.
    """
    requests = [sweep.request(point) for point in sweep.points]  # refuses what is impossible now
    rows = []
    for point, request in zip(sweep.points, requests, strict=True):
        folder = out / point.name
        pipeline = sweep.pipelines[point.precision]
        draw(pipeline, request, folder, (), progress=progress)
        images = drawn_images(folder, Shards(folder, request, pipeline.bundle.manifest), request.labels)
        judged = [one(OpenedSet("samples", images=images)) for one in evaluators]
        rows.append(Row(point, request.sampler, sweep.evaluations(point), judged))
        seen(rows[-1])
        with atomic_file(out / RESULT) as temporary:
            result = {"schema_version": SCHEMA_VERSION, **about, "rows": [row.to_dict() for row in rows]}
            temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return rows


def labels_of(count: int, classes: int | None) -> list[int] | None:
    """Every class takes turns."""
    return None if classes is None else (np.arange(count) % classes).tolist()
