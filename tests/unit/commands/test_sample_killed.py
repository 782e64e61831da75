"""`admtrt sample` under `kill -9`: the same command continues, with the result of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bundles import exported_bundle, sham_bundle

import admtrt

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(admtrt.__file__).parents[1])}
SHARD = 4
COUNT = 120  # long enough for a signal to arrive while it runs, on a fast machine too


def command(bundle: Path, out: Path) -> list[str]:
    options = {
        "--out": out, "--num": COUNT, "--seed": 5, "--method": "unipc", "--steps": 10, "--scale": 3.0,
        "--shard-size": SHARD, "--batch-size": 3, "--threads": 1, "--format": "npz",
    }  # fmt: skip
    flat = [str(part) for pair in options.items() for part in pair]
    return [sys.executable, "-m", "admtrt", "sample", str(bundle), *flat, "--format", "png", "--json"]


def finish(bundle: Path, out: Path) -> dict[str, int]:
    done = subprocess.run(
        command(bundle, out), env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, int] = json.loads(done.stdout)
    return result


def finished(out: Path) -> dict[str, int]:
    """The names of the finished shards, with their inodes."""
    return {path.name: path.stat().st_ino for path in (out / "shards").glob("[0-9]*.npz")}


def kill_after(shards: int, bundle: Path, out: Path) -> None:
    """Start the command and kill it shortly after this many shards are finished."""
    with subprocess.Popen(
        command(bundle, out), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 180
        while len(finished(out)) < shards:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_a_command_killed_several_times_loses_and_repeats_nothing(tmp_path: Path) -> None:
    bundle = exported_bundle("guided")
    assert finish(bundle, tmp_path / "whole")["continued_from"] == 0
    out = tmp_path / "killed"
    stood: dict[str, int] = {}
    for shards in (1, 2, 5):
        kill_after(shards, bundle, out)
        assert not (out / "samples.npz").exists()
        assert stood.items() <= finished(out).items()  # what was finished was not drawn again
        stood = finished(out)
    continued = finish(bundle, out)["continued_from"]
    assert continued == SHARD * len(stood)
    assert 5 * SHARD <= continued < COUNT
    assert stood.items() <= finished(out).items()
    with np.load(tmp_path / "whole" / "samples.npz") as whole, np.load(out / "samples.npz") as resumed:
        assert whole.files == resumed.files == ["arr_0", "arr_1"]
        for name in whole.files:
            np.testing.assert_array_equal(resumed[name], whole[name])
        assert len(np.unique(resumed["arr_0"].reshape(COUNT, -1), axis=0)) == COUNT
    pngs = [sorted(path.name for path in (folder / "png").iterdir()) for folder in (tmp_path / "whole", out)]
    assert pngs[0] == pngs[1]
    assert len(pngs[0]) == COUNT


KILLED_AT_EVERY_FILE_OPERATION = """
import os, signal, sys
from pathlib import Path
import numpy as np
from admtrt.bundle import Bundle
from admtrt.schedule.sampler import SamplerConfig
from admtrt.images import save_grid  # and, with it, what the children would each import
from admtrt.runtime.bulk import BulkRequest, draw
from admtrt.runtime.pipeline import Pipeline
from PIL import Image, ImageDraw, ImageFont

class Echo:
    def run(self, graph, feeds):
        return dict.fromkeys(("out", "grad", "x_prev", "pred_x0"), feeds["x"])

pipeline = Pipeline(Bundle.open(sys.argv[1]), Echo())
root = Path(sys.argv[2])
request = BulkRequest(7, np.arange(7) % 3, 0, SamplerConfig(steps="2"), 2, 3)
formats = ["npz", "png", "grid"]
draw(pipeline, request, root / "whole", formats)

def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.suffix in (".png", ".json") and not p.name.startswith(".")}

kills = 0
while True:  # each process comes one operation further than the one before it
    pid = os.fork()
    if not pid:
        left = kills + 1
        def hook(event, arguments):
            global left
            if event in ("open", "os.rename", "os.mkdir", "os.remove") and "killed" in str(arguments[0]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        draw(pipeline, request, root / "killed", formats)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status):
        assert os.waitstatus_to_exitcode(status) == 0
        break
    kills += 1
whole, killed = contents(root / "whole"), contents(root / "killed")
arrays = [dict(np.load(root / folder / "samples.npz")) for folder in ("whole", "killed")]
assert arrays[0].keys() == arrays[1].keys() == {"arr_0", "arr_1"}
assert all((arrays[0][key] == arrays[1][key]).all() for key in arrays[0])
assert whole.keys() == killed.keys(), (whole.keys() ^ killed.keys())
assert whole == killed
print(kills)
"""


def test_a_run_killed_at_file_operations_can_always_go_on(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_FILE_OPERATION, sham_bundle(tmp_path / "b").path, tmp_path],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 15


# A shell starts its background jobs with SIGINT ignored, and the tests may run in one.
HEARS_INTERRUPTS = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from admtrt.__main__ import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_says_how_to_go_on(number: signal.Signals, tmp_path: Path) -> None:
    bundle, out = exported_bundle("guided"), tmp_path / "run"
    arguments = command(bundle, out)[3:]  # without python -m admtrt
    with subprocess.Popen(
        [sys.executable, "-c", HEARS_INTERRUPTS, *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 180
        while not finished(out):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(number)
        shown, complaint = process.communicate(timeout=180)
    assert process.returncode == 128 + number
    assert shown == ""
    assert complaint.startswith("error: interrupted\n")
    assert "sampling goes on with the same command" in complaint
    assert "Traceback" not in complaint
    assert finish(bundle, out)["continued_from"] >= SHARD
