"""Kill Ray workers and nodes at random moments while samples are drawn, and compare the files.

    .venv-ray/bin/python tools/ray_kills.py BUNDLE --kills 100     # `make test-ray` makes .venv-ray

One cluster of two nodes on this machine; run after run is drawn over it while something is killed every
few seconds, one time in five the second node. Exit code 1 if a run fails or its files are not those of a run
here.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}

import numpy as np

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
SHARDS = 16


def sampling(bundle: Path, out: Path, steps: str, *options: str) -> subprocess.Popen[bytes]:
    """A process that draws, in shards of four samples."""
    code = "import sys; from admtrt.cli import run; sys.exit(run(sys.argv[1:]))"
    drawn = ["--num", str(4 * SHARDS), "--batch-size", "4", "--steps", steps, "--format", "npz"]
    command = ["sample", str(bundle), "--out", str(out), *drawn, "--threads", "1", *options]
    return subprocess.Popen([sys.executable, "-c", code, *command], stdout=subprocess.DEVNULL)


def digest(out: Path) -> str:
    """A hash of every shard's bytes and of the merged samples."""
    files = sorted((out / "shards").iterdir())
    found = hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files))
    with np.load(out / "samples.npz") as held:
        for name in sorted(held):
            found.update(held[name].tobytes())
    return found.hexdigest()


def workers() -> list[int]:
    """Process ids of the workers that draw."""
    found = []
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if place.name.isdigit() and b"ray::_do" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
    return found


class Cluster:
    """Two nodes, of which the second is sometimes lost.

    Attributes:
        workers, nodes: how many were killed.
    """

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as Nodes

        self.workers = self.nodes = 0
        self._nodes = Nodes()
        self._nodes.add_node(**NODE, include_dashboard=False)
        self._second = self._nodes.add_node(**NODE)
        self._random = random.Random(5)

    @property
    def address(self) -> str:
        """The address to join it at."""
        return str(self._nodes.address)

    def moment(self, mean: float) -> float:
        """Seconds until the next kill."""
        return self._random.uniform(0.2, 1.8) * mean

    def kill(self) -> None:
        """Kill a worker or, one time in five, the second node, which is replaced."""
        if self._random.random() < 0.2:
            self._nodes.remove_node(self._second, allow_graceful=False)
            self._second = self._nodes.add_node(**NODE)
            self.nodes += 1
        elif found := workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._random.choice(found), signal.SIGKILL)
                self.workers += 1

    def close(self) -> None:
        """Stop all nodes."""
        self._nodes.shutdown()


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", default="ddim250")
    parser.add_argument("--pause", type=float, default=4.0, help="mean seconds between two kills")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="admtrt-kills-"))
    assert sampling(given.bundle, folder / "alone", given.steps).wait() == 0
    expected, began, runs, wrong = digest(folder / "alone"), time.monotonic(), 0, 0
    cluster = Cluster()
    while cluster.workers + cluster.nodes < given.kills:
        out = folder / str(runs)
        drawing = sampling(given.bundle, out, given.steps, "--ray", cluster.address)
        while drawing.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                drawing.wait(cluster.moment(given.pause))
                break
            cluster.kill()
        runs += 1
        wrong += drawing.wait() != 0 or digest(out) != expected
        told = {
            "runs": runs,
            "workers killed": cluster.workers,
            "nodes killed": cluster.nodes,
            "wrong": wrong,
        }
        print(json.dumps(told), file=sys.stderr, flush=True)
        shutil.rmtree(out)
    cluster.close()
    shutil.rmtree(folder)
    print(json.dumps(told | {"seconds": round(time.monotonic() - began)}))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
