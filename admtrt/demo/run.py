"""Train, export, verify, sample and judge. Each stage resumes an interrupted attempt."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

from admtrt.config_files import load_config
from admtrt.data.image_set import load_data
from admtrt.demo.judge import Judge, Verdict
from admtrt.evaluate.compare import Asked
from admtrt.evaluate.images import training_images, training_part
from admtrt.evaluate.judging import Computing, Evaluator
from admtrt.evaluate.network import open_network
from admtrt.evaluate.sets import OpenedSet
from admtrt.evaluate.sweep import Row, Sweep, labels_of, points, run_sweep
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.features.folder import make_judge
from admtrt.images import save_grid
from admtrt.models.checkpoint import load_network
from admtrt.run_config import RunConfig
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.shards import Shards
from admtrt.training.loop import train
from admtrt.verify.stages import verify_bundle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from admtrt.bundle import Bundle
    from admtrt.console import Output
    from admtrt.data.sources import Pixels
    from admtrt.evaluate.compare import Value
    from admtrt.evaluate.sweep import Point
    from admtrt.verify.report import VerificationReport

SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
SAMPLES = 200
"""Number of samples judged at every scale, 20 of each class."""
TARGET = 0.95
"""Required accuracy of guided samples at the best scale, for both samplers."""
SAMPLERS = {"ddpm": "50", "ddim": "ddim25"}
FEATURES = "judge.features"
_BATCH = 100
_GRID_ROWS = 4
_JUDGE_STEPS = 400


@dataclass(frozen=True, eq=False)
class SweepPoint:
    """One sampler at one guidance scale.

    Attributes:
        row: the sweep's row, judged in the features of a classifier.
        verdict: the verdict of the support vector machine.
    """

    row: Row
    verdict: Verdict

    @property
    def method(self) -> str:
        """Method of the sampler."""
        return self.row.sampler.method

    @property
    def sampler(self) -> str:
        """The sampler in words: ``DDIM, 25 steps``."""
        return f"{self.method.upper()}, {self.row.evaluations} steps"

    @property
    def scale(self) -> float:
        """Guidance scale."""
        return self.row.sampler.scale

    @property
    def grid(self) -> str:
        """The name of the picture of its first samples, a row a sample of each class."""
        return f"grid-{self.method}-scale-{self.scale:g}.png"

    @property
    def summary(self) -> str:
        """The verdict in words."""
        return f"{self.sampler}, scale {self.scale:g}: {self.verdict.accuracy:.1%} judged their class"

    @property
    def distances(self) -> dict[str, Value]:
        """``fd`` and ``kid``."""
        return self.row.judged[0].metrics


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo.

    Attributes:
        seconds: of each stage.
        judge_accuracy: accuracy of the judge on real images that it was not fitted to.
        judge_images: number of real images that it was fitted to.
        points: the sweep.
        floor: ``fd`` and ``kid`` of at most as many real images, unseen by networks and judges.
        verification: the parity of the bundle with the trained networks.
    """

    seconds: dict[str, float]
    judge_accuracy: float
    judge_images: int
    points: tuple[SweepPoint, ...]
    floor: dict[str, Value]
    verification: VerificationReport

    def best(self, method: str) -> SweepPoint:
        """The point of a sampler with the highest accuracy; among equals, that with the smallest scale."""
        return max(
            (p for p in self.points if p.method == method), key=lambda p: (p.verdict.accuracy, -p.scale)
        )

    @property
    def passed(self) -> bool:
        """True if both samplers reach the target and the bundle passes verification."""
        reached = all(self.best(method).verdict.accuracy >= TARGET for method in SAMPLERS)
        return reached and self.verification.passed


def demo_config() -> RunConfig:
    """The configuration shipped with the package."""
    with _config_file() as path:
        return load_config(RunConfig, path)


def _config_file() -> AbstractContextManager[Path]:
    return resources.as_file(resources.files("admtrt.demo") / "digits.toml")


def run_demo(out: Path, *, output: Output) -> DemoResult:
    """Run everything in ``out`` and return the results; trained networks are kept."""
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
        unet,
        classifier,
        out / "bundle",
        overwrite=True,
        progress=lambda name: output.note(f"exporting {name}"),
    )
    seconds["export"] = time.perf_counter() - start
    start = time.perf_counter()
    verification = verify_bundle(
        bundle, unet, classifier, progress=lambda text: output.note(f"verifying: {text}")
    )
    seconds["verify"] = time.perf_counter() - start
    start = time.perf_counter()
    output.note("training the judge's features")
    with _config_file() as file:
        make_judge(file, out / FEATURES, steps=_JUDGE_STEPS, overwrite=True)
    seconds["train the judge"] = time.perf_counter() - start
    start = time.perf_counter()
    judge = Judge(config.data)

    def seen(point: SweepPoint, images: Pixels) -> None:
        output.note(point.summary)
        shown = images[: 10 * _GRID_ROWS]
        save_grid(shown, out / point.grid, columns=10, labels=[str(row % 10) for row in range(len(shown))])

    chosen = [
        point
        for method, steps in SAMPLERS.items()
        for point in points([method], [steps], SCALES, ["fp32"], [None])
    ]
    swept = _swept(bundle, chosen, out, judge, seen=seen)
    floor = swept[0].row.judged[0].floor
    assert floor is not None  # the evaluator has one
    seconds["sample and judge"] = time.perf_counter() - start
    return DemoResult(
        seconds=seconds,
        judge_accuracy=judge.accuracy,
        judge_images=judge.images,
        points=tuple(swept),
        floor=floor,
        verification=verification,
    )


def _swept(
    bundle: Bundle,
    chosen: Sequence[Point],
    out: Path,
    judge: Judge,
    *,
    seen: Callable[[SweepPoint, Pixels], None],
) -> list[SweepPoint]:
    """Draw the same seeds at every point, and judge them; earlier samples and features are reused.

    Args:
        bundle: the demo's bundle.
        chosen: the points.
        out: the demo's folder, which has the judge's features.
        judge: the support vector machine.
        seen: called with each point and its images uint8 [N, H, W, C].
    """
    swept = Sweep(
        pipelines={"fp32": Pipeline.from_bundle(bundle.path, batch_size=_BATCH)},
        points=chosen,
        labels=labels_of(SAMPLES, 10),
        count=SAMPLES,
        seed=0,
        batch_size=_BATCH,
        options={},
    )
    folder = out / f"sweep-{bundle.digest[:8]}"  # another bundle uses another folder
    found = []

    def add(row: Row) -> None:
        shards = Shards(folder / row.point.name, swept.request(row.point), bundle.manifest)
        images = np.concatenate(list(shards.images()))
        found.append(SweepPoint(row, judge(images, np.asarray(swept.labels))))
        seen(found[-1], images)

    evaluators = [_evaluator(out / FEATURES)]
    run_sweep(swept, evaluators, folder, {"bundle": bundle.digest}, progress=lambda *_: None, seen=add)
    return found


def _evaluator(features: Path) -> Evaluator:
    """Distances in the features of a classifier trained on images of neither side."""
    data = demo_config().data.model_copy(update={"random_crop": False, "random_flip": False})
    images = load_data(data)
    reference, floor = (
        OpenedSet(name, images=training_images(training_part(images, part)))
        for name, part in (("reference", "train"), ("floor", "floor"))
    )
    network = open_network(str(features))
    return Evaluator(network, reference, Asked(("fid", "kid")), Computing(), floor=floor)
