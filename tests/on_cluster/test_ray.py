"""Sampling over a Ray cluster of two nodes on this machine: workers and a node are lost, nothing else is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from bundles import exported_bundle
from feature_networks import features_folder, pictures, run_folder

from admtrt.cli import run

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.ray
STORE = 100 * 2**20
SHARDS = 12


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # 15 would starve them
    from ray.cluster_utils import Cluster  # `make test-ray` has it: a cluster that cannot be is a failure

    made = Cluster()
    made.add_node(num_cpus=1, object_store_memory=STORE, include_dashboard=False)
    yield made
    made.shutdown()


def sample(out: Path, *options: str) -> int:
    """Draw 24 samples in shards of two."""
    fixed = ["--num", "24", "--batch-size", "2", "--steps", "400", "--format", "npz", "--threads", "1"]
    return run(["sample", str(exported_bundle("guided")), "--out", str(out), *fixed, *options])


def digest(out: Path) -> str:
    """A hash of every shard and of the merged samples."""
    shards = sorted((out / "shards").iterdir())
    assert [file.name for file in shards] == [f"{2 * index:08d}.npz" for index in range(SHARDS)]
    found = hashlib.sha256(b"".join(file.read_bytes() for file in shards))
    with np.load(out / "samples.npz") as held:
        for name in sorted(held):
            found.update(held[name].tobytes())
    return found.hexdigest()


def shards_of(out: Path) -> int:
    return len(list((out / "shards").glob("*.npz"))) if (out / "shards").exists() else 0


def workers() -> list[int]:
    """Processes of Ray that draw."""
    found = []
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if place.name.isdigit() and b"ray::_do" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
    return found


def test_lost_workers_and_a_lost_node_change_nothing(cluster: Any, tmp_path: Path) -> None:
    assert sample(tmp_path / "alone") == 0
    second = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    killed = 0

    def disturb() -> None:
        nonlocal killed
        for after in (1, 3, 5):
            while shards_of(tmp_path / "spread") < after:
                time.sleep(0.02)
            for pid in workers()[:1]:
                os.kill(pid, signal.SIGKILL)
                killed += 1
        while shards_of(tmp_path / "spread") < 7:
            time.sleep(0.02)
        cluster.remove_node(second, allow_graceful=False)

    disturbing = threading.Thread(target=disturb, daemon=True)
    disturbing.start()
    assert sample(tmp_path / "spread", "--ray", cluster.address) == 0
    disturbing.join(60)
    assert not disturbing.is_alive()
    assert killed >= 2
    assert digest(tmp_path / "spread") == digest(tmp_path / "alone")
    assert sample(tmp_path / "spread", "--ray", cluster.address) == 0  # nothing is left to do


def test_features_of_a_run_are_computed_alike(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two nodes, a worker is killed, some blocks are lost: the numbers and files of an evaluation here."""
    cluster.add_node(num_cpus=1, object_store_memory=STORE)
    features_folder(tmp_path / "inception")
    run_folder(tmp_path / "run", pictures(3000, 1), asked=3000)
    np.savez(tmp_path / "r.npz", arr_0=pictures(400, 2))

    def evaluated(*options: str) -> tuple[dict[str, Any], dict[str, bytes]]:
        fixed = ["--reference", str(tmp_path / "r.npz"), "--features", str(tmp_path / "inception")]
        fixed += ["--threads", "1", "--no-error", "--json"]
        capsys.readouterr()
        assert run(["evaluate", "samples", str(tmp_path / "run"), *fixed, *options]) == 0
        blocks = sorted((tmp_path / "run" / "features").rglob("*.npz"))
        return json.loads(capsys.readouterr().out), {file.name: file.read_bytes() for file in blocks}

    here = evaluated()
    shutil.rmtree(tmp_path / "run" / "features")
    killed = 0

    def disturb() -> None:
        nonlocal killed
        while not killed and len(list((tmp_path / "run").glob("features/*/*.npz"))) < 12:
            for pid in workers()[:1]:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            time.sleep(0.005)

    disturbing = threading.Thread(target=disturb, daemon=True)
    disturbing.start()
    assert evaluated("--ray", cluster.address) == here
    disturbing.join(60)
    assert killed
    assert len(here[1]) == 12
    for name in list(here[1])[::3]:
        next((tmp_path / "run").glob(f"features/*/{name}")).unlink()
    assert evaluated("--ray", cluster.address) == here
    assert run(["evaluate", "samples", str(tmp_path / "r.npz"), "--reference", str(tmp_path / "r.npz"),
                "--features", str(tmp_path / "inception"), "--ray", cluster.address]) == 2  # fmt: skip
    assert "a run of admtrt sample" in capsys.readouterr().err


def test_faults_are_told_in_our_words(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        (["--ray", cluster.address, "--threads", "64"], "no node of the cluster has 64 CPUs"),
        (["--ray", "127.0.0.1:1"], "cannot join the Ray cluster"),
        (["--ray", cluster.address, "--backend", "auto"], "--backend auto chooses for one machine"),
    ):
        assert sample(tmp_path / "faults", *options) == 2
        errors = capsys.readouterr().err
        assert message in errors, errors
        assert "Traceback" not in errors
