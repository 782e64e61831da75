"""Compute features of a run's samples in other processes, which store blocks for the evaluation to find.

A block is the same file as one computed in this process, so the later computations are the same, in the order
of the samples.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from admtrt.cluster.tasks import spread
from admtrt.errors import OutputError, RequestError
from admtrt.evaluate.extract import AUTO, Extractor
from admtrt.evaluate.images import chosen_rows
from admtrt.evaluate.kept import BLOCK, block_folder, keep_block
from admtrt.evaluate.network import open_network
from admtrt.npz import NpzFile
from admtrt.runtime.bulk import REQUEST
from admtrt.runtime.shards import SHARDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from admtrt.evaluate.images import Pixels
    from admtrt.evaluate.judging import Computing
    from admtrt.evaluate.network import FeatureNetwork
    from admtrt.evaluate.sets import OpenedSet


@dataclass(frozen=True)
class _Seeing:
    """Recipe for an extractor in another process; ``network`` is ``--features`` with an absolute path."""

    network: str
    digest: str
    backend: str
    precision: str
    threads: int | None


@dataclass(frozen=True, eq=False)
class BlockWork:
    """Computes blocks of features of a run's samples.

    Attributes:
        seeing: the extractor, which each process opens once.
        run: absolute path of the run's folder, on a file system that all machines share.
        shards: name and number of samples of each shard, in order, at this time; a run in progress adds more.
        rows: indices of the chosen samples, int64 ascending; None for all.
        batch_size: images computed at once.
        name: name of the set, for messages.
    """

    seeing: _Seeing
    run: Path
    shards: tuple[tuple[str, int], ...]
    rows: NDArray[np.int64] | None
    batch_size: int
    name: str

    @property
    def blocks(self) -> range:
        """The blocks to compute."""
        count = sum(rows for _, rows in self.shards) if self.rows is None else len(self.rows)
        return range(-(-count // BLOCK))

    def __call__(self, block: int) -> int:
        """Compute a block's features unless they exist. Returns the block.

        Raises:
            OutputError: if the run's folder is not seen here, or cannot be written.
            RequestError: if the feature network here has another digest.
            DataError: if a shard cannot be read, or features are not finite.
        """
        if not (self.run / REQUEST).is_file():
            raise OutputError(
                f"{os.uname().nodename} does not see the run in {self.run}",
                hint="Put the run in a folder that all machines share, under the same path.",
            )
        extractor = _opened(self.seeing)
        folder = block_folder(self.run, extractor)
        if self.run not in folder.parents:
            raise OutputError(
                f"{os.uname().nodename} cannot write into {self.run}",
                hint="Features are kept beside the samples: let the workers write there.",
            )
        keep_block(folder, self._images(block), extractor, self.name, block * BLOCK, self.batch_size)
        return block

    def _images(self, block: int) -> Pixels:
        """Read the images of a block from its shards."""
        ends = np.cumsum([rows for _, rows in self.shards])
        first, stop = block * BLOCK, (block + 1) * BLOCK
        wanted = np.arange(first, min(stop, int(ends[-1]))) if self.rows is None else self.rows[first:stop]
        places = np.searchsorted(ends, wanted, side="right")
        parts = []
        for place in np.unique(places):
            file, count = self.shards[place]
            images = NpzFile.open(self.run / SHARDS / file)["images"].read()
            parts.append(images[wanted[places == place] - (ends[place] - count)])
        return np.concatenate(parts)


@functools.lru_cache(maxsize=2)
def _opened(seeing: _Seeing) -> Extractor:
    network = open_network(seeing.network)
    if network.digest != seeing.digest:
        raise RequestError(
            f"the features {seeing.network} are others on {os.uname().nodename}",
            hint="Put the same features on all machines, under the same path.",
        )
    return Extractor(network, seeing.backend, seeing.precision, threads=seeing.threads)


def block_work(
    opened: OpenedSet, network: FeatureNetwork, computing: Computing, *, count: int | None, seed: int
) -> BlockWork:
    """Make the work for a set's features.

    Args:
        opened: the set.
        network: the feature network.
        computing: settings of the feature extraction.
        count, seed: how the set was drawn, see :func:`~admtrt.evaluate.images.draw`.

    Raises:
        RequestError: if the set is not a run, or the backend is ``auto``.
        DataError: if a shard cannot be read.
    """
    if computing.backend == AUTO:
        raise RequestError(
            "--backend auto chooses for one machine", hint="Name the backend that all machines are to use."
        )
    run = None if opened.images is None else opened.images.run
    if run is None:
        raise RequestError(
            "a cluster computes features of a run of admtrt sample, shard by shard",
            hint="Name the run's folder, or leave --ray out.",
        )
    files = sorted((run / SHARDS).glob("*.npz"))
    shards = tuple((file.name, NpzFile.open(file)["images"].shape[0]) for file in files)
    rows = None if count is None else chosen_rows(sum(held for _, held in shards), count, seed)
    place = network.folder or network.graph
    named = "" if network.folder is not None else f"{network.name}="
    return BlockWork(
        _Seeing(
            f"{named}{place.resolve()}",
            network.digest,
            computing.backend,
            computing.precision,
            computing.threads,
        ),
        run.resolve(),
        shards,
        rows,
        computing.batch_size,
        opened.name,
    )


def computed_elsewhere(work: BlockWork, address: str) -> Iterator[int]:
    """Let a cluster compute every block. Yields each block's number of images when done, in any order.

    Raises:
        MissingDependencyError, EngineError, AdmtrtError: as :func:`~admtrt.cluster.tasks.spread`.
    """
    total = sum(rows for _, rows in work.shards) if work.rows is None else len(work.rows)
    for block in spread(work, work.blocks, address=address, cpus=work.seeing.threads or 1):
        yield min(BLOCK, total - block * BLOCK)
