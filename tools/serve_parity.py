"""Requests of random solvers, steps, scales and guides that join at random moments, against the pipeline.

    python tools/serve_parity.py BUNDLE --requests 500 --backend onnxruntime --backend openvino

Prints the largest difference of uint8 levels and of values for each backend; exit code 1 where fp32 differs
by more than a level. Bundles with guides besides the classifier have two of three requests guided by one.
"""

from __future__ import annotations

import argparse
import os
import queue
import random
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from admtrt.images import to_uint8
from admtrt.runtime.example import example_targets
from admtrt.runtime.guide_targets import GuideTargets
from admtrt.runtime.image_inputs import ImageInputs
from admtrt.runtime.noise import initial_noise
from admtrt.runtime.pipeline import Pipeline
from admtrt.serve.admission import Bounds
from admtrt.serve.engine import Engine
from admtrt.serve.flight import Done, Flight, Preview
from admtrt.serve.model import Model

_MOVED = 1e-6  # of the noise, relative
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


def guided_by(generator: random.Random, pipeline: Pipeline, chosen: dict[str, Any]) -> dict[str, Any]:
    """Targets of a guide for two of three requests, in a place that the sampler has."""
    known = {
        name: guide for name, guide in pipeline.bundle.manifest.guides.items() if guide.kind != "reference"
    }
    if not known or generator.random() < 1 / 3:
        return {}
    name = generator.choice(list(known))
    place = "shift" if chosen["method"] in ("ddpm", "ddim") and generator.random() < 0.5 else "score"
    targets = example_targets(known[name], 1, generator.randrange(2**32))
    if "mask" in targets:
        targets["mask"] = (targets["mask"] > 0.5).astype(np.float32)
    chosen["guided_by"] = pipeline.guide_choices([name], place={name: place}, scale={name: 0.3})
    return {name: targets}


def measure(bundle: Path, backend: str, precision: str, count: int) -> tuple[int, float, Counter[int], int]:
    """Levels, values, how many images differ by how many levels at most, and how many are unsteady.

    Those are images which differ by more than a level, and by as much between two runs of the pipeline alone
    whose noise is a millionth apart: a guide with kinks may amplify rounding at will.
    """
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
        inputs = ImageInputs(targets=GuideTargets(guided_by(generator, pipeline, choices)))
        draw = engine.model.draw(labels, seeds, choices=dict(choices), inputs=inputs)  # type: ignore[arg-type]

        def notify(event: Any, number: int = number) -> None:
            if not isinstance(event, Preview):
                came.put((number, event))

        asked.append((labels, seeds, choices, inputs))
        engine.submit(
            Flight(draw, notify, client=str(number % 5), priority=generator.choice(["interactive", "batch"]))
        )
        time.sleep(generator.expovariate(1 / 0.02))
    ends = [came.get() for _ in range(count)]
    engine.drain()
    engine.join()  # not every library takes a run while another thread's goes on
    most, furthest, images, unsteady = 0, 0.0, Counter[int](), 0
    for number, event in ends:
        assert isinstance(event, Done), event
        labels, seeds, choices, inputs = asked[number]
        drawn = np.stack(event.images)
        expected = pipeline.draw(pipeline.sampler(**choices), labels, seeds, inputs=inputs)
        levels = levels_between(to_uint8(drawn), expected.images)
        steady = np.ones(len(levels), bool)
        if levels.max() > 1:
            noise = initial_noise(seeds, drawn.shape[1:])
            for draws in range(4):  # of moves as small as rounding
                moved = np.random.default_rng(draws).uniform(-_MOVED, _MOVED, noise.shape).astype(np.float32)
                beside = replace(inputs, latents=noise * (1 + moved))
                again = pipeline.draw(pipeline.sampler(**choices), labels, seeds, inputs=beside)
                steady &= levels_between(again.images, expected.images) <= 1
            print(f"{levels.tolist()} levels, steady {steady.tolist()}: {choices}", file=sys.stderr)
        unsteady += int((~steady & (levels > 1)).sum())
        most = max(most, int(levels[steady].max(initial=0)))
        furthest = max(furthest, float(np.abs(drawn - expected.x)[steady].max(initial=0)))
        images.update(levels.tolist())
    return most, furthest, images, unsteady


def levels_between(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The largest difference of each image, in levels."""
    difference: np.ndarray[Any, Any] = np.abs(one.astype(int) - other.astype(int)).max(axis=(1, 2, 3))
    return difference


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
        levels, values, images, unsteady = measure(given.bundle, backend, given.precision, given.requests)
        failed |= given.precision == "fp32" and levels > 1
        told = ", ".join(f"{count} by {level}" for level, count in sorted(images.items()))
        text = f"at most {levels} levels, {values:.2g} in value; images by levels: {told}"
        text += f" ({unsteady} unsteady in the pipeline alone, not counted before)" if unsteady else ""
        print(f"{backend} {given.precision}: {text}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
