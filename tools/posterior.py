"""Inpainting, super-resolution and deblurring of held-out images by DPS, with a bundle's guide `linear`.

admtrt export UNET --guide linear --out BUNDLE
python tools/posterior.py BUNDLE CONFIG.toml --picture picture.png > table.md

The images are those that CONFIG holds out of the training, with noise of 0.05 on the measurement. The scale
is the best of those that meet the measurement within that noise on other held-out images.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from admtrt.config_files import load_config
from admtrt.data.image_set import load_data, split
from admtrt.errors import AdmtrtError, RequestError
from admtrt.images import from_uint8, save_grid, to_uint8
from admtrt.run_config import DataConfig, RunConfig
from admtrt.runtime.low_pass import bicubic_matrix
from admtrt.runtime.operators import Operator
from admtrt.runtime.pipeline import Pipeline

SIGMA = 0.05
SHOWN, TILE = 16, 32
"""Columns of the picture, and the least size of its tiles in pixels."""


def psnr(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the images, values in [-1, 1], in dB."""
    error = ((found.clip(-1, 1) - truth) ** 2).reshape(len(truth), -1).mean(1)
    return float((10 * np.log10(4 / error)).mean())


class Task:
    """A measurement of images, and what one has without a guide.

    Args:
        operator: its text; ``identity`` is inpainting.
        images: the truth, [N, C, H, W].
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


def held_out_images(config: DataConfig, count: int) -> np.ndarray:
    """The first images that no network has learned from, float32 [count, C, H, W]."""
    _, held_out = split(load_data(config), config.hold_out)
    if len(held_out) < count:
        raise RequestError(
            f"{len(held_out)} images are held out, and {count} are needed",
            hint="Give --count fewer, or a configuration whose data.hold_out is larger.",
        )
    pixels = held_out.stack(range(count), [np.random.default_rng(0)] * count)
    return from_uint8(pixels.transpose(0, 3, 1, 2))


def main(
    bundle: Path,
    config: Path,
    steps: str,
    count: int,
    tried: int,
    scales: list[float],
    blur: str,
    picture: Path | None,
) -> None:
    """Print the table."""
    tasks = {
        "inpainting, half of the pixels": "identity",
        "super-resolution 2x": "sr:2",
        f"deblurring {blur}": f"blur:{blur}",
    }
    pipeline = Pipeline.from_bundle(bundle)
    images = held_out_images(load_config(RunConfig, config).data, tried + count)
    first, judged = images[:tried], images[tried:]
    plain = pipeline(seeds=range(count), steps=steps, scale=0).x
    print("| task | scale | without a guide | PSNR | gain | residual (noise 0.05) |")
    print("|---|---|---|---|---|---|")
    rows = [judged]
    for name, operator in tasks.items():
        own = Task(operator, first, 1)
        found = {scale: drawn(pipeline, own, steps, scale) for scale in scales}
        met = [scale for scale, one in found.items() if own.residual(one) <= SIGMA] or list(found)
        scale = max(met, key=lambda one: psnr(found[one], first))
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
        tiles = np.concatenate([to_uint8(np.float32(row[:SHOWN])) for row in rows])
        larger = max(1, TILE // images.shape[2])
        save_grid(tiles.repeat(larger, axis=1).repeat(larger, axis=2), picture, columns=min(SHOWN, count))


def drawn(pipeline: Pipeline, task: Task, steps: str, scale: float) -> np.ndarray:
    """Samples that a task's measurement leads."""
    found: np.ndarray = pipeline(
        seeds=range(len(task.truth)), steps=steps, scale=0, guides={"linear": task.targets()},
        guide_scale={"linear": scale},
    ).x  # fmt: skip
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="of an unconditional UNet, exported with --guide linear")
    parser.add_argument("config", type=Path, help="the training's configuration, whose data is read")
    parser.add_argument("--steps", default="250", help="of DDPM")
    parser.add_argument("--count", type=int, default=64, help="images to judge")
    parser.add_argument("--tried", type=int, default=16, help="other images, which choose the scale")
    parser.add_argument(
        "--scales",
        type=lambda text: list(map(float, text.split(","))),
        default=[0.25, 0.5, 0.75, 1.0, 2.0],
        metavar="N,N,...",
        help="scales to choose from",
    )
    parser.add_argument("--blur", default="1:5", help="SIGMA[:SIZE] of the deblurring, in pixels")
    parser.add_argument(
        "--picture", type=Path, help="PNG to write: the truth; of each task what is known and both results"
    )
    given = parser.parse_args()
    try:
        main(**vars(given))
    except AdmtrtError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
