"""Bulk runs with a denoiser that computes nothing, and helpers that read their files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.runtime.bulk import BulkRequest
from admtrt.schedule.sampler import SamplerConfig

if TYPE_CHECKING:
    from pathlib import Path

    from admtrt.runtime.pipeline import Pipeline

SAMPLER = SamplerConfig(steps="3", scale=1.0)


class Echo:
    """A denoiser that returns x_T, so that an image identifies its seed; it counts its images."""

    def __init__(self) -> None:
        self.seen = 0
        self.fails_at: int | None = None

    def run(self, graph: str, feeds: Any) -> dict[str, Any]:
        x = feeds["x"]
        if graph == "update":
            return {"x_prev": x, "pred_x0": x}
        if graph == "classifier_gradient":
            return {"grad": np.zeros_like(x)}
        self.seen += len(x)
        if self.fails_at is not None and self.seen >= self.fails_at:
            raise KeyboardInterrupt
        return {"out": np.concatenate([x, x], axis=1)}


def request(count: int = 10, **changes: Any) -> BulkRequest:
    """A request with shards of four samples and alternating classes."""
    given: dict[str, Any] = {
        "count": count,
        "labels": None if "labels" in changes else np.arange(count, dtype=np.int64) % 3,
        "first_seed": 7,
        "sampler": SAMPLER,
        "batch_size": 2,
        "shard_size": 4,
    }
    return BulkRequest(**given | changes)


def expected(pipeline: Pipeline, count: int = 10) -> np.ndarray:
    """The images of :func:`request`, drawn in one batch."""
    seeds = list(range(7, 7 + count))
    return pipeline([index % 3 for index in range(count)], seeds, steps="3", scale=1.0).images


def shards(folder: Path) -> list[str]:
    """The names of a run's shards."""
    return sorted(path.name for path in (folder / "shards").iterdir())


def images_in(path: Path) -> np.ndarray:
    """The images of an ``.npz`` file of samples."""
    with np.load(path, allow_pickle=False) as archive:
        images: np.ndarray = archive["arr_0"]
    return images
