"""Inpainting, super-resolution and deblurring of the demo's digits by DPS; a clean classifier as a guide.

admtrt demo --out OUT
python tools/posterior_digits.py OUT --picture docs/posterior-digits.png > table.md

64 images that no network saw, with noise of 0.05 on the measurement. The scale is the best of those that
meet the measurement within that noise on 16 others. The classifiers are small networks without t, trained
here on what the UNet was trained on, with little or much noise on the images; the demo's support vector
machine judges their samples.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from admtrt.data.image_set import load_data, split
from admtrt.demo.judge import Judge
from admtrt.demo.run import demo_config
from admtrt.errors import AdmtrtError
from admtrt.export.guides.classifiers import classifier
from admtrt.export.guides.losses import linear
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.images import from_uint8, save_grid, to_uint8
from admtrt.models.checkpoint import load_network
from admtrt.runtime.low_pass import bicubic_matrix
from admtrt.runtime.operators import Operator
from admtrt.runtime.pipeline import Pipeline

SIGMA = 0.05
TASKS = {
    "inpainting, half of the pixels": "identity",
    "super-resolution 2x": "sr:2",
    "deblurring": "blur:1:5",
}
SCALES = (0.25, 0.5, 0.75, 1.0, 2.0)
CHOSEN, JUDGED = 16, 64
SAMPLES = 200
NOISE = {"clean": 0.1, "blurred": 2.0}
"""Of the two classifiers' training, by the guide's name: the x_0 that the UNet predicts at a high noise level
is blurred, which a network of sharp digits alone has never seen."""
SETTINGS: tuple[tuple[str, Literal["score", "before_clip"], str, float], ...] = (
    ("clean", "score", "ddim25", 8.0),
    ("clean", "score", "50", 2.0),
    ("clean", "before_clip", "ddim25", 2.0),
    ("clean", "before_clip", "ddim25", 8.0),
    ("clean", "before_clip", "50", 2.0),
    ("blurred", "score", "ddim25", 1.0),
    ("blurred", "before_clip", "ddim25", 2.0),
    ("blurred", "before_clip", "50", 2.0),
)


def clean_classifier(images: np.ndarray, labels: np.ndarray, noise: float) -> nn.Module:
    """A small network of images alone, [N, 1, 8, 8] to logits.

    Args:
        images: float32, clean.
        labels: of them.
        noise: largest standard deviation of what is added to an image, uniform between 0 and it.
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.SiLU(),
        nn.Flatten(), nn.Linear(64 * 16, 64), nn.SiLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    for _ in range(400):
        rows = torch.randint(len(x), (128,))
        noisy = x[rows] + noise * torch.rand(128, 1, 1, 1) * torch.randn(128, 1, 8, 8)
        loss = nn.functional.cross_entropy(net(noisy), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval().requires_grad_(False)


def psnr(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the images, values in [-1, 1], in dB."""
    error = ((found.clip(-1, 1) - truth) ** 2).reshape(len(truth), -1).mean(1)
    return float((10 * np.log10(4 / error)).mean())


class Task:
    """A measurement of images, and what one has without a guide.

    Args:
        operator: its text; ``identity`` is inpainting.
        images: the truth, [N, 1, 8, 8].
        seed: of noise and masks.
    """

    def __init__(self, operator: str, images: np.ndarray, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.truth, self.operator = images, Operator(operator, images.shape[1:])
        self.mask = generator.random((len(images), 1, *images.shape[2:])) < 0.5
        if operator != "identity":
            self.mask[:] = True
        clean = self.operator.applied(images)
        noisy = clean + SIGMA * generator.standard_normal(clean.shape)
        self.measurement = (noisy * (self.mask if operator == "identity" else 1)).astype(np.float32)

    def targets(self) -> dict[str, Any]:
        """Of the guide ``linear``."""
        masks = {"mask": self.mask} if not self.mask.all() else {}
        return {"measurement": self.measurement, "operator": self.operator.text, **masks}

    def without(self, plain: np.ndarray) -> np.ndarray:
        """Known pixels pasted into plain samples; else the measurement, enlarged by bicubic resizing."""
        if not self.mask.all():
            return np.where(self.mask, self.measurement, plain)
        size, small = self.truth.shape[2], self.measurement.shape[2]
        enlarge = bicubic_matrix(small, size) if small != size else np.eye(size)
        return enlarge @ self.measurement @ enlarge.T

    def residual(self, found: np.ndarray) -> float:
        """Root mean square of what the measurement differs by."""
        difference = (self.operator.applied(found.clip(-1, 1)) - self.measurement)[
            np.broadcast_to(self.mask, found.shape) if not self.mask.all() else ...
        ]
        return float(np.sqrt((difference**2).mean()))


def main(out: Path, steps: str, picture: Path | None) -> None:
    """Print both tables."""
    config = demo_config().data
    seen, held_out = split(load_data(config), config.hold_out)
    images, known = (from_uint8(np.asarray(part.images).transpose(0, 3, 1, 2)) for part in (held_out, seen))
    unet = load_network(out / "models" / "unet.safetensors", kind="unet")
    labels = np.asarray(seen.labels)
    guides = [linear(images.shape[1:])]
    for name, noise in NOISE.items():
        guides.append(classifier([clean_classifier(known, labels, noise)], 10, name))
    with tempfile.TemporaryDirectory() as folder:
        bundle_from_checkpoints(unet, None, Path(folder) / "bundle", guides=guides)
        pipeline = Pipeline.from_bundle(Path(folder) / "bundle")
        posterior(pipeline, images, steps, picture)
        judge_classifier(pipeline)


def posterior(pipeline: Pipeline, images: np.ndarray, steps: str, picture: Path | None) -> None:
    """The table of measurements."""
    print("| task | scale | without a guide | PSNR | gain | residual (noise 0.05) |")
    print("|---|---|---|---|---|---|")
    tried, judged = images[:CHOSEN], images[CHOSEN : CHOSEN + JUDGED]
    plain = pipeline(seeds=range(JUDGED), steps=steps, batch_size=JUDGED).x
    rows = [judged]
    for name, operator in TASKS.items():
        own = Task(operator, tried, 1)
        found = {scale: drawn(pipeline, own, steps, scale) for scale in SCALES}
        met = [scale for scale, one in found.items() if own.residual(one) <= SIGMA] or list(found)
        scale = max(met, key=lambda one: psnr(found[one], tried))
        task = Task(operator, judged, 2)
        result, without = drawn(pipeline, task, steps, scale), task.without(plain)
        before, after = psnr(without, judged), psnr(result, judged)
        print(
            f"| {name} | {scale:g} | {before:.1f} dB | {after:.1f} dB | {after - before:+.1f} dB "
            f"| {task.residual(result):.3f} |",
            flush=True,
        )
        shown = task.operator.filled(task.measurement)
        rows += [np.where(task.mask, shown, 0) if not task.mask.all() else shown, without, result]
    if picture is not None:
        tiles = np.concatenate([to_uint8(np.float32(row[:16])) for row in rows])
        save_grid(tiles.repeat(4, axis=1).repeat(4, axis=2), picture, columns=16)


def drawn(pipeline: Pipeline, task: Task, steps: str, scale: float) -> np.ndarray:
    """Samples that a task's measurement leads."""
    count = len(task.truth)
    found: np.ndarray = pipeline(
        seeds=range(count), steps=steps, guides={"linear": task.targets()}, guide_scale={"linear": scale},
        batch_size=count,
    ).x  # fmt: skip
    return found


def judge_classifier(pipeline: Pipeline) -> None:
    """The table of the classifiers."""
    judge = Judge(demo_config().data)
    labels = np.arange(SAMPLES) % 10
    print("\n| classifier, noise up to | place | steps | scale | judged their class | diversity |")
    print("|---|---|---|---|---|---|")
    for name, place, steps, scale in SETTINGS:
        samples = pipeline(
            labels.tolist(), range(SAMPLES), steps=steps, guides={name: {}}, guide_scale={name: scale},
            guide_place={name: place}, batch_size=100,
        )  # fmt: skip
        verdict = judge(samples.images, labels)
        print(
            f"| {NOISE[name]:g} | {place} | {steps} | {scale:g} | {verdict.accuracy:.1%} "
            f"| {verdict.diversity:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder that `admtrt demo` made")
    parser.add_argument("--steps", default="250", help="of DDPM, for the measurements")
    parser.add_argument(
        "--picture", type=Path, help="PNG to write: the truth; of each task what is known and both results"
    )
    given = parser.parse_args()
    try:
        main(given.out, given.steps, given.picture)
    except AdmtrtError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
