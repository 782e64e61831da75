"""A clean classifier guides the demo's digits: where its gradient enters, and what its training sees.

admtrt demo --out OUT
python tools/clean_classifier_digits.py OUT > table.md

The classifiers are small networks without t, trained here on what the UNet was trained on, with little or
much noise on the images; the demo's support vector machine judges their samples.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from admtrt.data.image_set import load_data, split
from admtrt.demo.judge import Judge
from admtrt.demo.run import demo_config
from admtrt.errors import AdmtrtError
from admtrt.export.guides.classifiers import classifier
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.images import from_uint8
from admtrt.models.checkpoint import load_network
from admtrt.runtime.pipeline import Pipeline

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


def main(out: Path) -> None:
    """Print the table."""
    config = demo_config().data
    seen, _ = split(load_data(config), config.hold_out)
    known, labels = from_uint8(np.asarray(seen.images).transpose(0, 3, 1, 2)), np.asarray(seen.labels)
    unet = load_network(out / "models" / "unet.safetensors", kind="unet")
    guides = [classifier([clean_classifier(known, labels, noise)], 10, name) for name, noise in NOISE.items()]
    with tempfile.TemporaryDirectory() as folder:
        bundle = bundle_from_checkpoints(unet, None, Path(folder) / "bundle", guides=guides)
        judge_classifier(Pipeline.from_bundle(bundle))


def judge_classifier(pipeline: Pipeline) -> None:
    """The table of the classifiers."""
    judge = Judge(demo_config().data)
    labels = np.arange(SAMPLES) % 10
    print("| classifier, noise up to | place | steps | scale | judged their class | diversity |")
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
    given = parser.parse_args()
    try:
        main(given.out)
    except AdmtrtError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
