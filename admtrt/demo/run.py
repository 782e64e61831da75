"""Train, export, verify, sample and judge: each stage resumes where an earlier attempt was cut off."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

from admtrt.bundle import Bundle
from admtrt.config_files import load_config
from admtrt.demo.judge import Judge, Verdict
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.images import save_grid
from admtrt.models.checkpoint import load_network
from admtrt.run_config import RunConfig
from admtrt.runtime.pipeline import Pipeline
from admtrt.training.loop import train
from admtrt.verify.stages import verify_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from admtrt.console import Output
    from admtrt.verify.report import VerificationReport

SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
SAMPLES = 200
"""Judged at every scale, 20 of each class."""
TARGET = 0.95
"""Fraction of guided samples that must be judged their class at the best scale, in both samplers."""
SAMPLERS = {"ddpm": "50", "ddim": "ddim25"}
_BATCH = 100
_GRID_ROWS = 4


@dataclass(frozen=True)
class SweepPoint:
    """The verdict on one sampler at one guidance scale, and the seconds that drawing took."""

    method: str
    steps: str
    scale: float
    verdict: Verdict
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        seconds: of each stage.
        judge_accuracy: of the judge on real images that it was not fitted on.
        judge_images: real images that it was fitted on.
        points: the sweep.
        verification: the parity of the bundle with the trained networks.
        grids: pictures by file name and caption.
    """

    seconds: dict[str, float]
    judge_accuracy: float
    judge_images: int
    points: tuple[SweepPoint, ...]
    verification: VerificationReport
    grids: dict[str, str]

    def best(self, method: str) -> SweepPoint:
        """The point of a sampler with the highest accuracy; of equals, the one with the smallest scale."""
        return max(
            (p for p in self.points if p.method == method), key=lambda p: (p.verdict.accuracy, -p.scale)
        )

    @property
    def passed(self) -> bool:
        """Whether both samplers reach the target and the bundle computes what PyTorch computes."""
        reached = all(self.best(method).verdict.accuracy >= TARGET for method in SAMPLERS)
        return reached and self.verification.passed


def demo_config() -> RunConfig:
    """The configuration shipped with the package."""
    with resources.as_file(resources.files("admtrt.demo") / "digits.toml") as path:
        return load_config(RunConfig, path)


def run_demo(out: Path, *, output: Output) -> DemoResult:
    """Do everything in ``out`` and return what was found; networks that are trained already are kept."""
    config = demo_config()
    seconds: dict[str, float] = {}
    for kind in ("classifier", "unet"):
        output.note(f"training the {kind}")
        start = time.perf_counter()
        train(kind, config, out / "models", output=output, resume=True)
        seconds[f"train {kind}"] = time.perf_counter() - start
    start = time.perf_counter()
    unet = load_network(out / "models" / "unet.safetensors", kind="unet")
    classifier = load_network(out / "models" / "classifier.safetensors", kind="classifier")
    bundle = bundle_from_checkpoints(
        unet, classifier, out / "bundle", overwrite=True, report=lambda name: output.note(f"exporting {name}")
    )
    seconds["export"] = time.perf_counter() - start
    start = time.perf_counter()
    verification = verify_bundle(
        bundle, unet, classifier, report=lambda text: output.note(f"verifying: {text}")
    )
    seconds["verify"] = time.perf_counter() - start
    start = time.perf_counter()
    judge = Judge(config.data)
    points, grids = _sweep(bundle, judge, out, output)
    seconds["sample and judge"] = time.perf_counter() - start
    return DemoResult(
        seconds=seconds,
        judge_accuracy=judge.accuracy,
        judge_images=judge.images,
        points=points,
        verification=verification,
        grids=grids,
    )


def _sweep(
    bundle: Bundle, judge: Judge, out: Path, output: Output
) -> tuple[tuple[SweepPoint, ...], dict[str, str]]:
    """Every sampler at every scale, from the same seeds."""
    pipeline = Pipeline.from_bundle(bundle.path)
    labels = np.arange(SAMPLES) % 10
    points, grids = [], {}
    for method, steps, scale in _choices():
        start = time.perf_counter()
        samples = pipeline(labels.tolist(), range(SAMPLES), steps=steps, scale=scale, batch_size=_BATCH)
        elapsed = time.perf_counter() - start
        verdict = judge(samples.images, labels)
        output.note(f"{method} {steps} steps, scale {scale:g}: {verdict.accuracy:.1%} judged their class")
        points.append(SweepPoint(method=method, steps=steps, scale=scale, verdict=verdict, seconds=elapsed))
        if scale in (0.0, 1.0, 4.0):
            name = f"grid-{method}-scale-{scale:g}.png"
            shown = samples.images[: 10 * _GRID_ROWS]
            save_grid(shown, out / name, columns=10, labels=[str(label) for label in labels[: len(shown)]])
            grids[name] = (
                f"{method.upper()}, {steps} steps, scale {scale:g}: {verdict.accuracy:.1%} judged their class"
            )
    return tuple(points), grids


def _choices() -> Iterator[tuple[str, str, float]]:
    for method, steps in SAMPLERS.items():
        for scale in SCALES:
            yield method, steps, scale
