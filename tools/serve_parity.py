"""Requests that join at random moments, with random solvers, steps and scales, against the pipeline alone.

    python tools/serve_parity.py BUNDLE --requests 500 --backend onnxruntime --backend openvino

Prints the largest difference of uint8 levels and of values for each backend; exit code 1 where fp32 differs
by more than a level.
"""

from __future__ import annotations

import argparse
import os
import queue
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from admtrt.images import to_uint8
from admtrt.runtime.pipeline import Pipeline
from admtrt.serve.admission import Bounds
from admtrt.serve.engine import Engine
from admtrt.serve.flight import Done, Flight, Preview
from admtrt.serve.model import Model

METHODS: list[dict[str, Any]] = [
    {"method": "ddpm"},
    {"method": "ddim"},
    {"method": "ddim", "eta": 0.7},
    {"method": "dpmpp"},
    {"method": "dpmpp", "order": 3},
    {"method": "dpmpp", "sde": True},
    {"method": "dpmpp", "form": "single"},
    {"method": "unipc", "order": 3},
    {"method": "heun"},
    {"method": "euler", "churn": (5.0, 0.0, 1e9, 1.0)},
    {"method": "dpmpp", "threshold": "dynamic"},
]


def choices_of(generator: random.Random, *, guided: bool) -> dict[str, Any]:
    """A sampler of any kind."""
    chosen = dict(generator.choice(METHODS))
    chosen["steps"] = generator.randint(8, 60) | (chosen["method"] == "heun")  # which spends odd numbers
    chosen["scale"] = generator.choice([0.0, 1.0, 2.0, 4.0]) if guided else 0.0
    if chosen["scale"] and generator.random() < 0.3:
        chosen["guidance_interval"] = (0.3, 5.0)
    return chosen


def measure(bundle: Path, backend: str, precision: str, count: int) -> tuple[int, float, Counter[int]]:
    """Levels, values, and how many images differ by how many levels at most."""
    pipeline = Pipeline.from_bundle(bundle, backend=backend, precision=precision, threads=1)  # type: ignore[arg-type]
    engine = Engine(Model("parity", pipeline), bounds=Bounds(10**6, 1e9, 1.0), sizes=(1, 2, 4, 8))
    engine.warm()
    engine.start()
    generator, came, asked = random.Random(0), queue.Queue[tuple[int, Any]](), []
    classes, guided = engine.model.num_classes or 1, pipeline.bundle.manifest.classifier is not None
    for number in range(count):
        rows = generator.randint(1, 4)
        labels = [generator.randrange(classes) for _ in range(rows)] if engine.model.num_classes else None
        seeds = [generator.randrange(2**64) for _ in range(rows)]
        choices = choices_of(generator, guided=guided)
        draw = engine.model.draw(labels, seeds, choices=dict(choices))  # type: ignore[arg-type]

        def notify(event: Any, number: int = number) -> None:
            if not isinstance(event, Preview):
                came.put((number, event))

        asked.append((labels, seeds, choices))
        engine.submit(
            Flight(draw, notify, client=str(number % 5), priority=generator.choice(["interactive", "batch"]))
        )
        time.sleep(generator.expovariate(1 / 0.02))
    most, furthest, images = 0, 0.0, Counter[int]()
    for _ in range(count):
        number, event = came.get()
        assert isinstance(event, Done), event
        labels, seeds, choices = asked[number]
        drawn, expected = np.stack(event.images), pipeline(labels, seeds, **choices)
        furthest = max(furthest, float(np.abs(drawn - expected.x).max()))
        levels = np.abs(to_uint8(drawn).astype(int) - expected.images).max(axis=(1, 2, 3))
        most = max(most, int(levels.max()))
        images.update(levels.tolist())
    engine.drain()
    engine.join()
    return most, furthest, images


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--backend", action="append")
    parser.add_argument("--precision", default="fp32")
    given = parser.parse_args()
    failed = False
    for backend in given.backend or ["onnxruntime"]:
        levels, values, images = measure(given.bundle, backend, given.precision, given.requests)
        failed |= given.precision == "fp32" and levels > 1
        told = ", ".join(f"{count} by {level}" for level, count in sorted(images.items()))
        text = f"at most {levels} levels, {values:.2g} in value; images by levels: {told}"
        print(f"{backend} {given.precision}: {text}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
