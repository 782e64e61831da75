"""Kills commands at random moments, then repeats them: nothing may be lost, differ, or be left lying about.

    python tools/kill_test.py --kills 1000

Tiny networks on the digits. Each command (train, sample, export, convert, build, evaluate for `evaluate
nll`, judge for `evaluate samples`) runs to its end once, undisturbed. Then it is started and killed
(SIGKILL) again and again, a few times in one folder; after each kill what had been finished must still be
there, and in the end the command runs to its end once more. Its files, or the JSON document that it prints,
must then be byte for byte those of the undisturbed run, with no temporary file beside them. Exit code 1 if
they are not. Every process is forked from this one, which has imported everything and run nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

import admtrt.cli
import admtrt.commands.checkpoints
import admtrt.evaluate.judging
import admtrt.export.pack
import admtrt.runtime.backends.opening
import admtrt.training.loop
import admtrt.verify.nll
from admtrt.bundle import Bundle
from admtrt.models.checkpoint import CheckpointConfig, build_network, save_checkpoint
from admtrt.runtime.engines.plans import PlanStore

if TYPE_CHECKING:
    from collections.abc import Callable

IMPORTED = (
    onnxruntime,
    admtrt.commands.checkpoints,
    admtrt.training.loop,
    admtrt.evaluate.judging,
    admtrt.verify.nll,
    admtrt.export.pack,
    admtrt.runtime.backends.opening,
)
CONFIG = """
[data]
source = "digits"
image_size = 8
channels = 1
[diffusion]
steps = 8
schedule = "cosine"
[unet]
image_size = 8
in_channels = 1
model_channels = 32
num_res_blocks = 1
channel_mult = [1]
attention_resolutions = []
num_heads = 2
dropout = 0.2
[train_unet]
steps = 12
batch_size = 8
lr = 1e-3
log_every = 2
checkpoint_every = 3
sample_every = 6
ema_rates = [0.5, 0.9]
"""
SHAPE = {
    "image_size": 8, "in_channels": 1, "model_channels": 32, "num_res_blocks": 1, "channel_mult": [1],
    "attention_resolutions": [], "num_heads": 2,
}  # fmt: skip
MOST_IN_A_ROW = 12
"""Kills in one folder before the command is left alone."""
TIMEOUT = 1800.0
"""Seconds after which a process that was left alone is taken to hang."""

Snapshot = dict[str, Any]


@dataclass
class Scene:
    """One command.

    Attributes:
        name: of the command.
        arguments: given the folder that it writes to, and which of two variants is written.
        finished: what a folder holds that no kill may take away or change, by name.
        result: what a folder holds in the end.
        variants: 2 where each run replaces what stands there by one of two different things.
    """

    name: str
    arguments: Callable[[Path, int], list[str]]
    finished: Callable[[Path], Snapshot]
    result: Callable[[Path], Snapshot]
    variants: int = 1


@dataclass
class Tally:
    """Outcome of one command."""

    kills: int = 0
    repeats: int = 0
    ended_first: int = 0
    leftovers_seen: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def temporaries(folder: Path) -> list[str]:
    """Everything under a folder that is named as a temporary, be it ours or a library's."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if ".tmp" in path.name or path.name.startswith("tmp")
    )


def files(folder: Path) -> Snapshot:
    """SHA-256 of every file; of metrics the lines without what the clock says."""
    found: Snapshot = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: line[key] for key in line if key != "images_per_second"} for line in lines]
        elif path.is_file() and path.name != ".lock":
            found[name] = digest(path)
    return found


def shards(folder: Path) -> Snapshot:
    """The shards of a run of samples."""
    return {path.name: digest(path) for path in folder.glob("shards/[0-9]*.npz")}


def plans(folder: Path) -> Snapshot:
    """Faults of each plan that has a record."""
    records, faults = PlanStore(folder / "plans").records()
    told = {record.key.digest: PlanStore(folder / "plans").fault(record, whole=True) for record in records}
    return told | dict.fromkeys(faults, "unreadable")


def bundle(folder: Path) -> Snapshot:
    """The files of a bundle, which opens."""
    if not (folder / "out").exists():
        return {}
    Bundle.open(folder / "out", memo=False)
    return {"bundle": files(folder / "out")}


def converted(folder: Path) -> Snapshot:
    """The checkpoint that was written."""
    return {"file": digest(folder / "out.pt")} if (folder / "out.pt").exists() else {}


def trained(folder: Path) -> Snapshot:
    """Weights that can be read, and no fewer steps than before."""
    from admtrt.training.state import load_state

    state = folder / "unet" / "state.safetensors"
    return {"step": load_state(state)[1]["step"]} if state.exists() else {}


def kept(folder: Path) -> Snapshot:
    """The blocks of features that are kept beside a run."""
    return {str(path.relative_to(folder)): digest(path) for path in folder.glob("features/*/*.npz")}


def printed(folder: Path) -> Snapshot:
    """The document that was printed."""
    return {"stdout": stream(folder, "stdout").read_text()}


def scenes(root: Path) -> list[Scene]:
    """All commands."""
    unets = [root / "unet-0.safetensors", root / "unet-1.safetensors"]
    guide, made = root / "classifier.safetensors", root / "bundle"
    threads = ["--batch-size", "2", "--steps", "8", "--threads", "1"]
    sampling = ["--num", "40", "--shard-size", "2", *(f"--format={name}" for name in ("npz", "png", "grid"))]
    data = ["--data", "digits", "--images", "40", "--json"]

    def train(out: Path, _: int) -> list[str]:
        return ["train", "unet", str(root / "run.toml"), "--out", str(out), "--resume"]

    def sample(out: Path, _: int) -> list[str]:
        return ["sample", str(made), "--out", str(out), *threads, *sampling]

    def export(out: Path, variant: int) -> list[str]:
        networks = [str(unets[variant]), "--classifier", str(guide)]
        return ["export", *networks, "--out", str(out / "out"), "--overwrite"]

    def convert(out: Path, variant: int) -> list[str]:
        return ["convert", str(unets[variant]), str(out / "out.pt"), "--overwrite"]

    def build(out: Path, _: int) -> list[str]:
        return ["build", str(made), "--library", "rtx", "--batch", "1:2:4", "--plans", str(out / "plans")]

    def evaluate(_: Path, __: int) -> list[str]:
        return ["evaluate", "nll", "--bundle", str(made), *threads, *data]

    def judge(out: Path, _: int) -> list[str]:
        if not out.exists():
            shutil.copytree(root / "drawn", out)  # features are kept beside the samples
        network = ["--features", f"tiny={root / 'features.onnx'}"]
        return [
            "evaluate",
            "samples",
            str(out),
            "--reference",
            "digits",
            *network,
            "--nearest",
            "digits",
            "--json",
        ]

    return [
        Scene("train", train, trained, files),
        Scene("sample", sample, shards, files),
        Scene("export", export, bundle, bundle, variants=2),
        Scene("convert", convert, converted, converted, variants=2),
        Scene("build", build, plans, plans),
        Scene("evaluate", evaluate, lambda _: {}, printed),
        Scene("judge", judge, kept, printed),
    ]


def prepare(root: Path) -> None:
    """Checkpoints of random weights, and a bundle of them."""
    (root / "run.toml").write_text(CONFIG)
    described: dict[str, Any] = {"diffusion": {"steps": 8, "schedule": "cosine"}, "sampler": {"scale": 1.0}}
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = CheckpointConfig.from_dict({"kind": "unet", "unet": SHAPE | {"dropout": 0.2}, **described})
        save_checkpoint(root / f"unet-{seed}.safetensors", random_weights(config), config)
    network = SHAPE | {"num_classes": 10, "num_head_channels": 16}
    config = CheckpointConfig.from_dict({"kind": "classifier", "classifier": network, **described})
    save_checkpoint(root / "classifier.safetensors", random_weights(config), config)
    classifier = ["--classifier", str(root / "classifier.safetensors")]
    export = ["export", str(root / "unet-0.safetensors"), *classifier, "--out", str(root / "bundle")]
    finish([*export, "--engine", "fp32"], root / "log")
    drawing = ["--num", "1200", "--steps", "ddim4", "--batch-size", "200", "--threads", "1"]
    finish(["sample", str(root / "bundle"), "--out", str(root / "drawn"), *drawing], root / "log")
    write_features(root / "features.onnx")


def write_features(path: Path) -> None:
    """A network of features: 24 products of the pixels with generated weights."""
    weights = np.random.default_rng(0).standard_normal((8 * 8 * 3, 24)).astype(np.float32) / 255
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["pixels"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["pool"]),
        ],
        "features",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 8, 8, 3])],
        [helper.make_tensor_value_info("pool", TensorProto.FLOAT, ["N", 24])],
        [numpy_helper.from_array(weights, "weights")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def random_weights(config: CheckpointConfig) -> dict[str, torch.Tensor]:
    """Of a network, none of them zero."""
    network = build_network(config)
    return {key: value + 0.02 * torch.randn_like(value) for key, value in network.state_dict().items()}


def stream(folder: Path, name: str) -> Path:
    """File of the stdout or stderr of the last process that wrote to a folder."""
    return folder.with_name(f"{folder.name}-{name}")


def start(arguments: list[str], folder: Path) -> int:
    """Fork a process that runs a command line; its streams go to files beside the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking beside threads, of which libraries keep idle ones
        pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(stream(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        code = admtrt.cli.run(arguments)
        sys.stdout.flush()
    finally:
        os._exit(code)


def ended(pid: int, seconds: float) -> int | None:
    """The exit code of a process; None if it still runs after so long."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.001)


def kill(pid: int) -> None:
    """End a process and wait for that."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def finish(arguments: list[str], folder: Path) -> float:
    """Run a command to its end; returns the seconds that it took.

    Raises:
        RuntimeError: if it fails or hangs, with what it said.
    """
    began = time.monotonic()
    pid = start(arguments, folder)
    code = ended(pid, TIMEOUT)
    if code is None:
        kill(pid)
    if code != 0:
        said = stream(folder, "stderr").read_text(errors="replace")[-500:]
        raise RuntimeError(f"{arguments[0]} ended with {'a hang' if code is None else code}: {said}")
    return time.monotonic() - began


def lost(before: Snapshot, after: Snapshot, allowed: list[Snapshot]) -> str:
    """Damage of a kill; empty where the state is one of those that are allowed."""
    if allowed:
        return "" if (not before and not after) or after in allowed else f"{after} is no whole state"
    for name, value in before.items():
        if name not in after or (after[name] < value if name == "step" else after[name] != value):
            return f"{name} was {value} and is {after.get(name)}"
    return ""


def one_life(
    scene: Scene,
    folder: Path,
    wholes: list[Snapshot],
    longest: float,
    chance: random.Random,
    tally: Tally,
    kills: int,
) -> None:
    """Kill a command some times in one folder, then let it end and compare."""
    finished: Snapshot = {}
    for _ in range(min(kills, chance.randint(1, MOST_IN_A_ROW))):
        pid = start(scene.arguments(folder, chance.randrange(scene.variants)), folder)
        code = ended(pid, chance.uniform(0, longest))
        if code is None:
            kill(pid)
            tally.kills += 1
        else:
            tally.ended_first += 1
            if code:
                tally.faults.append(f"exit code {code}: {(folder / 'stderr').read_text()[-300:]}")
        tally.leftovers_seen += len(temporaries(folder)) > 0
        now = scene.finished(folder)
        fault = lost(finished, now, wholes if scene.variants > 1 else [])
        if fault:
            tally.faults.append(f"after a kill {fault}")
        finished = now
    last = chance.randrange(scene.variants)
    finish(scene.arguments(folder, last), folder)
    tally.repeats += 1
    result = scene.result(folder)
    if result != wholes[last]:
        differing = sorted(name for name in result.keys() | wholes[last].keys()
                           if result.get(name) != wholes[last].get(name))  # fmt: skip
        tally.faults.append(f"differs from the undisturbed run in {', '.join(differing)}")
    if left := temporaries(folder):
        tally.faults.append(f"left behind: {', '.join(left)}")


def run(scene: Scene, root: Path, kills: int, seconds: float, chance: random.Random) -> Tally:
    """Kill one command so many times, or for so long."""
    tally, began = Tally(), time.monotonic()
    wholes, longest = [], 0.0
    for variant in range(scene.variants):
        folder = root / scene.name / f"whole-{variant}"
        longest = max(longest, finish(scene.arguments(folder, variant), folder))
        wholes.append(scene.result(folder))
    life = 0
    while tally.kills < kills and time.monotonic() - began < seconds and not len(tally.faults) > 5:
        folder = root / scene.name / f"life-{life}"
        life += 1
        try:
            one_life(scene, folder, wholes, longest, chance, tally, kills - tally.kills)
        except Exception as error:  # what the command says, or that its files cannot be read
            tally.faults.append(f"{folder.name}: {error}")
            continue
        shutil.rmtree(folder, ignore_errors=True)
    tally.seconds = round(time.monotonic() - began, 1)
    return tally


def main() -> int:
    """Kill what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=1000, help="in all; divided among the commands")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most, for each command")
    parser.add_argument("--command", action="append", help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="admtrt-kills-") as name:
        root = Path(name)
        os.environ["XDG_CACHE_HOME"], os.environ["TMPDIR"] = str(root / "cache"), str(root / "system")
        (root / "system").mkdir()
        tempfile.tempdir = None
        prepare(root)
        known = scenes(root)
        chosen = [scene for scene in known if not given.command or scene.name in given.command]
        if not chosen:
            parser.error(f"the commands are {', '.join(scene.name for scene in known)}")
        tallies = {}
        for index, scene in enumerate(chosen):
            share = given.kills // len(chosen) + (index < given.kills % len(chosen))
            tally = run(scene, root, share, given.seconds, random.Random(f"{given.seed} {scene.name}"))
            tallies[scene.name] = tally
            if not given.json:
                print(f"{scene.name:9} {tally.kills:4} kills, {tally.repeats} repeats, "
                      f"{tally.leftovers_seen} left something for the next run, {len(tally.faults)} faults, "
                      f"{tally.seconds:g} s", flush=True)  # fmt: skip
                for fault in tally.faults:
                    print(f"          {fault}", flush=True)
        left = temporaries(root / "cache")
    total = sum(tally.kills for tally in tallies.values())
    faults = sum(len(tally.faults) for tally in tallies.values()) + len(left)
    if given.json:
        summary = {name: vars(tally) for name, tally in tallies.items()}
        print(json.dumps({"kills": total, "faults": faults, "left_in_the_cache": left, "commands": summary}))
    else:
        print(f"{total} kills, {faults} faults" + (f"; left in the cache: {', '.join(left)}" if left else ""))
    return int(faults > 0)


if __name__ == "__main__":
    raise SystemExit(main())
