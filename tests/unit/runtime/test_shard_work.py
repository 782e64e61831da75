"""Shards drawn by other processes: the work is pickled, done once, and refused for another run."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from bundles import exported_bundle, pipeline

from admtrt.errors import MissingDependencyError, OutputError, RequestError
from admtrt.runtime.bulk import BulkRequest, draw
from admtrt.runtime.shard_work import ShardWork, Source

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ALONE = pipeline("guided")
REQUEST = BulkRequest(
    count=7,
    labels=np.arange(7) % 3,
    first_seed=5,
    sampler=ALONE.sampler(steps="3"),
    batch_size=2,
    shard_size=3,
)
SOURCE = Source(exported_bundle("guided"), ALONE.bundle.digest, "onnxruntime", "fp32", 1, None, 2)


def elsewhere(request: BulkRequest, directory: Path, starts: Sequence[int]) -> Iterator[int]:
    """As another process would: from a pickle, in any order, some twice."""
    for start in (*reversed(starts), *starts[:1]):
        work = pickle.loads(pickle.dumps(ShardWork(SOURCE, request, directory)))
        assert work(start) == start
        if start in starts:
            yield start


def test_shards_drawn_elsewhere_are_the_same(tmp_path: Path) -> None:
    draw(ALONE, REQUEST, tmp_path / "here", ["npz"])
    (tmp_path / "there").mkdir()
    done: list[int] = []
    draw(
        ALONE, REQUEST, tmp_path / "there", ["npz"], elsewhere=elsewhere, progress=lambda n, _: done.append(n)
    )
    assert sum(done) >= 7 * 3
    for file in sorted((tmp_path / "here" / "shards").iterdir()):
        assert file.read_bytes() == (tmp_path / "there" / "shards" / file.name).read_bytes()
    draw(ALONE, REQUEST, tmp_path / "there", ["npz"], elsewhere=lambda *given: [] if not given[2] else 1 / 0)  # type: ignore[arg-type, return-value]


def test_work_of_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not see the run"):
        ShardWork(SOURCE, REQUEST, tmp_path / "nowhere")(0)
    draw(ALONE, REQUEST, tmp_path / "run", ["npz"])
    (tmp_path / "run" / "shards" / "00000000.npz").unlink()
    other = replace(SOURCE, digest="0" * 64)
    with pytest.raises(RequestError, match="is another bundle on"):
        ShardWork(other, REQUEST, tmp_path / "run")(0)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from admtrt.cluster.tasks import spread

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match="needs the package 'ray'"):
        list(spread(lambda piece: piece, [1], address="local", cpus=1))
