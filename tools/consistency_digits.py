"""Train a diffusion model of the digits, distil it to a consistency model, and judge samples of both.

    python tools/consistency_digits.py OUT [--set SECTION.KEY=VALUE ...]

Prints a table: evaluations of the network, the fraction of 200 samples that the demo's judge finds to be of
their class, and their diversity. A run that was cut off goes on. Behind the numbers of docs/consistency.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from admtrt.config_files import load_config
from admtrt.console import Output
from admtrt.demo.judge import Judge
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.models.checkpoint import load_network
from admtrt.run_config import RunConfig
from admtrt.runtime.pipeline import Pipeline
from admtrt.training.loop import train

CONFIG = Path(__file__).parents[1] / "configs" / "digits-consistency.toml"
SAMPLES = 200
"""Judged, 20 of each class."""
STEPS = {"unet": (35,), "consistency": (1, 2, 3)}


def main() -> None:
    """Train, distil, export, sample and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    models = arguments.out / "models"
    teacher = f"train_consistency.teacher={models / 'unet.safetensors'}"
    config = load_config(RunConfig, CONFIG, [teacher, *arguments.set])
    judge = Judge(config.data)
    labels = [index % 10 for index in range(SAMPLES)]
    print("| model | evaluations | accuracy | diversity | seconds of training |\n|---|---|---|---|---|")
    for task in ("unet", "consistency"):
        began = time.perf_counter()
        train(task, config, models, output=Output(), resume=True)  # type: ignore[arg-type]
        seconds = time.perf_counter() - began
        loaded = load_network(models / f"{task}.safetensors", kind="unet")
        bundle = bundle_from_checkpoints(loaded, None, arguments.out / f"{task}.bundle", overwrite=True)
        pipeline = Pipeline.from_bundle(bundle)
        for steps in STEPS[task]:
            verdict = judge(pipeline(labels, steps=steps, batch_size=100).images, np.array(labels))
            row = f"| {task} | {steps} | {verdict.accuracy:.1%} | {verdict.diversity:.2f} | {seconds:.0f} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
