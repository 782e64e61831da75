"""The pictures of docs/fashion-mnist.md: by class, by scale, and a film of the denoising.

python tools/showcase.py fashion.bundle --out docs
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from admtrt.files import atomic_file
from admtrt.images import save_grid, to_uint8
from admtrt.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from admtrt.runtime.drawn import Step

NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
SCALE = 2.0
SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)
FRAME = 80  # milliseconds
LAST = 2000
ZOOM, GREYS = 2, 16  # small enough for a page


def main(bundle: Path, out: Path) -> None:
    """Draw everything; the same seeds wherever something is compared."""
    pipeline = Pipeline.from_bundle(bundle, backend="auto", batch_size=len(NAMES))
    labels = list(range(len(NAMES)))

    def row(seed: int, **choices: Any) -> NDArray[np.uint8]:
        seeds = [seed + label for label in labels]
        return pipeline(labels, seeds, batch_size=len(NAMES), **choices).images

    by_class = np.concatenate([row(100 * number, steps="100", scale=SCALE) for number in range(8)])
    save_grid(by_class, out / "fashion-mnist-classes.png", len(NAMES), [*NAMES, *[""] * 70])
    by_scale = [row(0, steps="100", scale=scale) for scale in SCALES]
    save_grid(
        np.concatenate(by_scale),
        out / "fashion-mnist-scales.png",
        len(NAMES),
        [f"{scale:g}" for scale in SCALES for _ in labels],
    )
    save_film(pipeline, out / "fashion-mnist.gif")


def save_film(pipeline: Pipeline, path: Path) -> None:
    """The state x above the image that the network expects, step by step, one column a class."""
    frames: list[Image.Image] = []

    def keep(step: Step) -> None:
        rows = [np.concatenate(list(to_uint8(x)), axis=1) for x in (step.x, step.x_0)]
        pixels = np.concatenate(rows, axis=0)[..., 0]
        if step.index % 2 == 0:
            size = (pixels.shape[1] * ZOOM, pixels.shape[0] * ZOOM)
            frames.append(Image.fromarray(pixels).resize(size, 0).quantize(GREYS))

    labels = list(range(len(NAMES)))
    pipeline(labels, labels, steps="50", scale=SCALE, batch_size=len(NAMES), callback=keep)
    with atomic_file(path) as temporary:
        frames[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=frames[1:],
            duration=[FRAME] * (len(frames) - 1) + [LAST],
            loop=0,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    main(given.bundle, given.out)
