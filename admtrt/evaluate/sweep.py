"""A sweep: draw and judge samples of a bundle for every combination of choices."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.evaluate.images import drawn_images
from admtrt.evaluate.sets import OpenedSet
from admtrt.files import atomic_file
from admtrt.runtime.bulk import BulkRequest, draw, open_graphs
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.shards import Shards
from admtrt.schedule.table import sampling_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from admtrt.evaluate.judging import Evaluator, Judged, Progress
    from admtrt.schedule.sampler import SamplerConfig
    from admtrt.schedule.table import SamplingSchedule

RESULT = "sweep.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Point:
    """One combination; None is the bundle's recommendation.

    Attributes:
        method, steps, scale: choices of the sampler.
        precision: of the networks.
        guidance_interval: interval of guided noise levels; None guides all.
    """

    method: str | None
    steps: str | None
    scale: float | None
    precision: str
    guidance_interval: tuple[float, float] | None

    @property
    def name(self) -> str:
        """The name of the point in tables and of its run's folder."""
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
    """All combinations of the choices. At scale 0 the guidance interval has no effect and is not varied."""
    every = (
        Point(method, step, scale, precision, None if scale == 0 else interval)
        for method, step, scale, precision, interval in itertools.product(
            methods, steps, scales, precisions, intervals
        )
    )
    return list(dict.fromkeys(every))


@dataclass(frozen=True, eq=False)
class Row:
    """A point and its results.

    Attributes:
        point: the combination.
        sampler: the resulting sampler of the bundle.
        evaluations: network evaluations per sample.
        guided: how many of them the guide changes.
        judged: the results in each set of features.
    """

    point: Point
    sampler: SamplerConfig
    evaluations: int
    guided: int
    judged: list[Judged]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.point.name,
            **asdict(self.point),
            "sampler": self.sampler.to_dict(),
            "evaluations": self.evaluations,
            "guided_evaluations": self.guided,
            "features": [one.to_dict() for one in self.judged],
        }


@dataclass(frozen=True, eq=False)
class Sweep:
    """Axes of a sweep.

    Attributes:
        pipelines: the bundle's pipelines by precision.
        points: the combinations.
        labels: class of each sample; None if the bundle has no classes.
        count, seed: number of samples and first seed of each point: all points use the same noise.
        batch_size: samples computed at once, and kept in one file.
        options: solver options by name, the same for every point.
    """

    pipelines: dict[str, Pipeline]
    points: Sequence[Point]
    labels: Sequence[int] | None
    count: int
    seed: int
    batch_size: int
    options: Mapping[str, Any]

    def request(self, point: Point) -> BulkRequest:
        """The request of one point.

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

    def schedule(self, point: Point) -> SamplingSchedule:
        """The schedule of a point's samples: one row for each evaluation of the networks."""
        manifest = self.pipelines[point.precision].bundle.manifest
        return sampling_schedule(manifest.diffusion, self.request(point).sampler)

    def total(self) -> int:
        """Sample-steps of all points."""
        return self.count * sum(len(self.schedule(point)) for point in self.points)


def run_sweep(
    sweep: Sweep,
    evaluators: Sequence[Evaluator],
    out: Path,
    about: dict[str, Any],
    *,
    progress: Progress,
    seen: Callable[[Row], None] = lambda _: None,
) -> list[Row]:
    """Draw and judge every point. ``sweep.json`` is written after each point.

    Samples and features are stored in one folder per point, so the same command continues after a kill.

    Args:
        sweep: what to draw.
        evaluators: judge the samples.
        out: the folder.
        about: description of the sweep, for ``sweep.json``.
        progress: called with the sample-steps done.
        seen: called with each finished row.

    Raises:
        RequestError: if a point is impossible, before anything is drawn.
        BundleError: if a graph cannot be used, likewise.
        OutputError: if a folder holds another run, or a shard that is damaged.
    """
    requests = [sweep.request(point) for point in sweep.points]  # raises now if impossible
    for point, request in zip(sweep.points, requests, strict=True):
        open_graphs(sweep.pipelines[point.precision], request)
    rows = []
    for point, request in zip(sweep.points, requests, strict=True):
        folder = out / point.name
        pipeline = sweep.pipelines[point.precision]
        draw(pipeline, request, folder, (), progress=progress)
        images = drawn_images(folder, Shards(folder, request, pipeline.bundle.manifest), request.labels)
        judged = [one(OpenedSet("samples", images=images)) for one in evaluators]
        schedule = sweep.schedule(point)
        rows.append(Row(point, request.sampler, len(schedule), int(schedule.guided.sum()), judged))
        seen(rows[-1])
        with atomic_file(out / RESULT) as temporary:
            result = {"schema_version": SCHEMA_VERSION, **about, "rows": [row.to_dict() for row in rows]}
            temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return rows


def labels_of(count: int, classes: int | None) -> list[int] | None:
    """All classes alternate."""
    return None if classes is None else (np.arange(count) % classes).tolist()
