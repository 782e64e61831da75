"""The picture of docs/images.md: one row for each way to begin at an image, or to be held to one.

admtrt demo --out OUT
python tools/images_picture.py OUT/bundle docs/images.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt import Known, Latents, Pipeline
from admtrt.data.image_set import load_data
from admtrt.demo.run import demo_config
from admtrt.errors import AdmtrtError
from admtrt.images import save_grid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

COUNT = 8
GUIDED: dict[str, Any] = {"scale": 3.0}


def main(arguments: argparse.Namespace) -> None:
    """Draw every row from the same images and seeds."""
    pipeline = Pipeline.from_bundle(arguments.bundle, batch_size=COUNT)
    images, labels = some_digits()
    others = [(label + 5) % 10 for label in labels]
    size = images.shape[1]
    left = np.tile(np.arange(size) < size // 2, (size, 1))
    between = Latents.of_seeds([3, 7], pipeline.bundle.manifest.network).between(0, 1, COUNT)
    inverted = pipeline.invert(images, steps="ddim100", levels=60)

    def drawn(given: list[int], **choices: Any) -> Pixels:
        return pipeline(given, range(COUNT), batch_size=COUNT, **{**GUIDED, **choices}).images

    rows = {
        "images": images,
        "init, 0.3": drawn(labels, init=images, strength=0.3, method="dpmpp", steps=20),
        "init, 0.7": drawn(labels, init=images, strength=0.7, method="dpmpp", steps=20),
        "left known": drawn(labels, known=Known(images, left), jump=(5, 5), steps=50),
        "low-pass 4": drawn(others, reference=images, low_pass=4, steps=50),
        "other class": drawn(others, latents=inverted, scale=20.0, clip=True),
        "seeds 3 to 7": drawn([8] * COUNT, latents=between, method="ddim", steps="ddim50"),
    }
    names = [name for name in rows for _ in range(COUNT)]
    save_grid(np.concatenate(list(rows.values())), arguments.out, columns=COUNT, labels=names)


def some_digits() -> tuple[Pixels, list[int]]:
    """The first image of each of eight classes: uint8 [8, 8, 8, 1], and the classes."""
    data = load_data(demo_config().data)
    labels = data.labels
    assert labels is not None
    chosen = [int(np.flatnonzero(labels == label)[0]) for label in range(COUNT)]
    return np.concatenate([data.images[place : place + 1] for place in chosen]), list(range(COUNT))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="that of admtrt demo")
    parser.add_argument("out", type=Path, help="the picture, .png")
    try:
        main(parser.parse_args())
    except AdmtrtError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
