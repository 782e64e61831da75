"""Error of an upsampler's images, beside bilinear enlargement.

    python tools/upsampler_error.py BUNDLE CONFIG.toml [--images N] [--steps STEPS ...] [--grid GRID.png]

``CONFIG.toml`` is the training file: of its ``[data]``, what is held out is judged. Each image is averaged
down, rounded to uint8 and enlarged again. Prints a table of squared errors; the grid has the columns small,
bilinear, upsampler (the first ``--steps``), true.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import interpolate

from admtrt.config_files import load_config
from admtrt.errors import AdmtrtError, RequestError
from admtrt.images import save_grid, to_uint8
from admtrt.run_config import RunConfig
from admtrt.runtime.pipeline import Pipeline
from admtrt.training.objectives import shrink
from admtrt.verify.nll_images import load_images

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from admtrt.bundle import Manifest

    Images = NDArray[np.float32]

_GRID_ROWS = 8
_BATCH = 64


@dataclass(frozen=True, eq=False)
class Task:
    """Held-out images and what an upsampler is given of them.

    Attributes:
        x_0: float32 [N, C, H, W] in [-1, 1], the true images.
        small: uint8 [N, h, w, C], averaged down.
        labels: of each image, or None where the upsampler takes none.
    """

    x_0: Images
    small: NDArray[np.uint8]
    labels: list[int] | None

    def bilinear(self) -> Images:
        """The small images enlarged, float32 [N, C, H, W]."""
        small = torch.from_numpy(self.small.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
        return interpolate(small, self.x_0.shape[2:], mode="bilinear").numpy()


def held_out(config: RunConfig, manifest: Manifest, count: int) -> Task:
    """Images that the training left out, or of all where it left out none.

    Raises:
        RequestError: if the bundle is no upsampler, or there are fewer images.
        DataError: if the images are not those of the bundle.
    """
    unet = manifest.network
    if unet.low_res_size is None:
        raise RequestError("the bundle is no upsampler", hint="Give one exported from an upsampler.")
    images = load_images(config.data, unet, manifest.class_names)
    if not 1 <= count <= len(images):
        raise RequestError(f"{count} images were asked for; there are {len(images)}")
    images = images.subset(np.random.default_rng(0).permutation(len(images))[:count])
    rng = np.random.default_rng(0)  # unused: nothing is cropped at random or flipped
    x_0 = np.stack([images.image(row, rng) for row in range(count)])
    small = (shrink(torch.from_numpy(x_0), unet.low_res_size) + 1) * 127.5
    labels = None if unet.num_classes is None or images.labels is None else images.labels.tolist()
    return Task(x_0, small.round().to(torch.uint8).numpy().transpose(0, 2, 3, 1), labels)


def row(name: str, drawn: Images, x_0: Images, seconds: float | None = None) -> str:
    """One line of the table: the mean of all images, and its standard error."""
    errors = np.square(drawn - x_0, dtype=np.float64).mean(axis=(1, 2, 3))
    spread = errors.std(ddof=1) / np.sqrt(len(errors)) if len(errors) > 1 else 0.0
    took = "" if seconds is None else f"{seconds:.0f}"
    return f"| {name} | {errors.mean():.4f} ± {spread:.4f} | {took} |"


def save_comparison(task: Task, bilinear: Images, drawn: Images, path: Path) -> None:
    """Write the grid: for each of the first images small, bilinear, drawn and true, side by side."""
    size = task.x_0.shape[2]
    factor = size // task.small.shape[1]
    small = task.small.repeat(factor, axis=1).repeat(factor, axis=2)
    columns = (small, to_uint8(bilinear), to_uint8(drawn), to_uint8(task.x_0))
    tiles = np.stack([column[:_GRID_ROWS] for column in columns], axis=1)
    titles = ["small", "bilinear", "upsampler", "true"]
    labels = titles + [""] * (tiles.shape[0] - 1) * len(titles)
    save_grid(tiles.reshape(-1, *tiles.shape[2:]), path, columns=len(titles), labels=labels)


def measure(arguments: argparse.Namespace) -> None:
    """Print the table, and write the grid where one is asked for."""
    pipeline = Pipeline.from_bundle(arguments.bundle)
    config = load_config(RunConfig, arguments.config)
    task = held_out(config, pipeline.bundle.manifest, arguments.images)
    bilinear = task.bilinear()
    what = "held-out images" if config.data.hold_out else "images"
    print(f"| {len(task.x_0)} {what} | mean squared error | s |\n|---|---|---|")
    print(row("bilinear", bilinear, task.x_0), flush=True)
    drawings = []
    for steps in arguments.steps:
        sampler = pipeline.sampler(steps=steps)
        start = time.perf_counter()
        drawn = pipeline(task.labels, steps=steps, low_res=task.small, batch_size=_BATCH).x
        seconds = time.perf_counter() - start
        name = f"upsampler, {sampler.method.upper()} {steps.removeprefix('ddim')} steps"
        print(row(name, drawn, task.x_0, seconds), flush=True)
        drawings.append(drawn)
    if arguments.grid is not None:
        save_comparison(task, bilinear, drawings[0], arguments.grid)


def main() -> None:
    """Parse the command line; a user's fault ends with exit code 2 and its message."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("--images", type=int, default=64, help="how many (default: 64)")
    parser.add_argument("--steps", nargs="+", default=["100", "ddim25"], help="default: 100 ddim25")
    parser.add_argument("--grid", type=Path)
    try:
        measure(parser.parse_args())
    except AdmtrtError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
