"""Tiny training runs, in this process and in child processes that are killed or run in parallel."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import admtrt
from admtrt.config_files import load_config
from admtrt.console import Output
from admtrt.run_config import RunConfig
from admtrt.training.engine import leave_engine
from admtrt.training.loop import TrainingResult, train

NETWORK = {
    "image_size": 8,
    "in_channels": 1,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1],
    "attention_resolutions": [],
    "num_heads": 2,
}
TRAINING = {
    "steps": 4,
    "batch_size": 8,
    "lr": 1e-3,
    "log_every": 2,
    "checkpoint_every": 2,
    "ema_rates": [0.5],
}


def tiny_config(
    *, unet: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **training: Any
) -> RunConfig:
    """Networks that take milliseconds per step on the digits; ``training`` applies to all three."""
    settings = TRAINING | training
    return RunConfig.from_dict(
        {
            "data": {"source": "digits", "image_size": 8, "channels": 1} | (data or {}),
            "diffusion": {"steps": 8, "schedule": "cosine"},
            "unet": NETWORK | {"num_classes": 10} | (unet or {}),
            "classifier": NETWORK | {"num_classes": 10, "num_head_channels": 16},
            "upsampler": NETWORK | {"low_res_size": 4},
            "train_unet": settings,
            "train_classifier": settings,
            "train_upsampler": settings,
        }
    )


def run(config: RunConfig, out: Path, *, kind: Any = "unet", **options: bool) -> TrainingResult:
    return train(kind, config, out, output=Output(), **options)


def in_python(*arguments: Any) -> str:
    """Run the interpreter on arguments, with admtrt on its path; returns its stdout."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(Path(admtrt.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def same(left: Path, right: Path) -> bool:
    first, second = weights(left), weights(right)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def lines(out: Path, kind: str = "unet") -> list[dict[str, Any]]:
    """The metrics of a run, without times."""
    found = [json.loads(text) for text in (out / kind / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        del line["images_per_second"]
    return found


def _child(config: RunConfig, out: Path, dies_at: int) -> int:
    """Train in a forked process, killed by SIGKILL at the given file operation in ``out`` unless negative."""
    pid = os.fork()
    if pid:
        return pid
    left = dies_at

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(str(out)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if dies_at > 0:
        sys.addaudithook(hook)
    code = 1
    try:
        run(config, out, resume=True)
        code = 0
    finally:
        os._exit(code)
    return 0


def train_under_fire(config: RunConfig, out: Path, kills: int) -> list[bool]:
    """Resume training until it is done, killed repeatedly at file operations and at random times.

    Returns:
        For each killed process, whether a state had been saved before.
    """
    rng = random.Random(1)
    killed = []
    for attempt in range(1000):
        safe = len(killed) >= kills
        at_file = attempt % 2 == 0 and not safe
        pid = _child(config, out, rng.randint(1, 40) if at_file else -1)
        if not at_file and not safe:
            time.sleep(rng.uniform(0.05, 0.3))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            if safe:
                return killed
        else:
            killed.append((out / "unet" / "state.safetensors").exists())
    raise AssertionError("the run never ended")


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, config_path, folder, *rest = sys.argv[1:]
    loaded = load_config(RunConfig, Path(config_path))
    if command == "train":
        run(loaded, Path(folder))
        leave_engine()
    else:
        run(loaded, Path(folder, "whole"))  # also imports modules for the children
        print(json.dumps(train_under_fire(loaded, Path(folder, "killed"), int(rest[0]))))
