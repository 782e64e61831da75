"""A picklable function that draws a run's shards in other processes."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from admtrt.errors import OutputError, RequestError
from admtrt.runtime.bulk import REQUEST, draw_shard
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.shards import Shards

if TYPE_CHECKING:
    from pathlib import Path

    from admtrt.contract import Precision
    from admtrt.runtime.bulk import BulkRequest


@dataclass(frozen=True)
class Source:
    """Recipe for opening a pipeline in another process.

    Attributes:
        bundle: absolute path of the bundle.
        digest: the digest that the bundle must have.
        backend, precision, threads, plans, batch_size: as for :meth:`Pipeline.from_bundle`.
    """

    bundle: Path
    digest: str
    backend: str
    precision: Precision
    threads: int | None
    plans: Path | None
    batch_size: int


@dataclass(frozen=True, eq=False)
class ShardWork:
    """Draws shards of a run.

    Attributes:
        source: the pipeline, which each process opens once.
        request: the checked request of the run.
        directory: absolute path of the claimed run directory, on a file system that all machines share.
    """

    source: Source
    request: BulkRequest
    directory: Path

    def __call__(self, start: int) -> int:
        """Draw the shard that begins with this sample unless it exists. Returns ``start``.

        Raises:
            OutputError: if the run's folder is not seen here, or cannot be written.
            RequestError: if the bundle here has another digest.
        """
        if not (self.directory / REQUEST).is_file():
            raise OutputError(
                f"{os.uname().nodename} does not see the run in {self.directory}",
                hint="Put --out in a folder that all machines share, under the same path.",
            )
        pipeline = _opened(self.source)
        shards = Shards(self.directory, self.request, pipeline.bundle.manifest)
        if not shards.holds(start):
            stop = min(start + self.request.shard_size, self.request.count)
            shards.write(start, draw_shard(pipeline, self.request, start, stop))
        return start


@functools.lru_cache(maxsize=2)
def _opened(source: Source) -> Pipeline:
    pipeline = Pipeline.from_bundle(
        source.bundle,
        backend=source.backend,
        precision=source.precision,
        threads=source.threads,
        plans=source.plans,
        batch_size=source.batch_size,
    )
    if pipeline.bundle.digest != source.digest:
        raise RequestError(
            f"{source.bundle} is another bundle on {os.uname().nodename}",
            hint="Put the same bundle on all machines, under the same path.",
        )
    return pipeline
