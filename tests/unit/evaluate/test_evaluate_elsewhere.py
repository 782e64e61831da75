"""Features as pieces of work for a cluster: the blocks of an evaluation here, in any order; refusals."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_networks import features_folder, pictures, run_folder, write_graph

from admtrt.cli import run
from admtrt.errors import OutputError, RequestError
from admtrt.evaluate.elsewhere import BlockWork, block_work
from admtrt.evaluate.judging import Computing
from admtrt.evaluate.network import open_network
from admtrt.evaluate.sets import open_set

COMPUTING = Computing(threads=1, batch_size=16)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Features, a run of 600 samples in shards of 7, a reference and a separate cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    features_folder(tmp_path / "inception")
    run_folder(tmp_path / "run", pictures(600, 1), asked=600)
    np.savez(tmp_path / "r.npz", arr_0=pictures(400, 2))
    return tmp_path


def work_of(place: Path, features: str = "inception", count: int | None = None) -> BlockWork:
    opened = open_set(str(place / "run"), "samples", count=count, seed=3)
    return block_work(opened, open_network(str(place / features)), COMPUTING, count=count, seed=3)


def evaluated(place: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    fixed = ["--reference", str(place / "r.npz"), "--features", str(place / "inception"), "--threads", "1"]
    assert run(["evaluate", "samples", str(place / "run"), *fixed, "--json", "--no-error", *options]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def kept(place: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((place / "run" / "features").rglob("*.npz"))}


@pytest.mark.parametrize("count", [None, 300])
def test_blocks_are_those_of_an_evaluation_here(
    place: Path, capsys: pytest.CaptureFixture[str], count: int | None
) -> None:
    options = [] if count is None else ["--count", str(count), "--seed", "3"]
    here = evaluated(place, capsys, *options)
    files = kept(place)
    shutil.rmtree(place / "run" / "features")
    work: BlockWork = pickle.loads(pickle.dumps(work_of(place, count=count)))
    assert len(work.blocks) == len(files) == (3 if count is None else 2)
    for block in reversed(work.blocks):
        assert work(block) == block
    assert kept(place) == files
    times = {file: file.stat().st_mtime_ns for file in (place / "run" / "features").rglob("*.npz")}
    assert evaluated(place, capsys, *options) == here
    work(0)  # is there already
    assert {file: file.stat().st_mtime_ns for file in times} == times


def test_what_cannot_be_computed_elsewhere_is_refused(place: Path, tmp_path: Path) -> None:
    network = open_network(str(place / "inception"))
    plain = open_set(str(place / "r.npz"), "samples")
    with pytest.raises(RequestError, match=r"computes features of a run of admtrt sample"):
        block_work(plain, network, COMPUTING, count=None, seed=0)
    opened = open_set(str(place / "run"), "samples")
    with pytest.raises(RequestError, match=r"auto chooses for one machine"):
        block_work(opened, network, Computing("auto"), count=None, seed=0)
    work = work_of(place)
    shutil.rmtree(place / "inception")
    features_folder(place / "inception", channels=1)
    with pytest.raises(RequestError, match=r"are others on"):
        work(0)
    shutil.move(place / "run", place / "elsewhere")
    with pytest.raises(OutputError, match=r"does not see the run"):
        work(0)


def test_a_graph_alone_is_named_by_its_file(place: Path) -> None:
    graph = write_graph(place / "own.onnx")
    opened = open_set(str(place / "run"), "samples")
    work = block_work(opened, open_network(f"own={graph}"), COMPUTING, count=None, seed=0)
    assert work(2) == 2
    assert len(kept(place)) == 1
