"""Images for people: uint8 pixels and labelled grids."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for each number of channels."""
_MOST_COLUMNS = 20
_SMALLEST_TILE = 64  # pixels: smaller images are enlarged to be visible
_GAP = 2
_FONT_SIZE = 11
_LABEL_HEIGHT = 16


def to_uint8(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Map float32 [N, C, H, W] in [-1, 1] to uint8 [N, H, W, C]; fractional levels are truncated."""
    return ((x + 1) * 127.5).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def from_uint8(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Map 0..255 to float32 in [-1, 1]; the axes are kept."""
    return pixels.astype(np.float32) / 127.5 - 1


def to_pillow(pixels: NDArray[np.uint8]) -> Image.Image:
    """Convert uint8 [H, W, C] to a Pillow image."""
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def usual_columns(count: int, labels: Sequence[str] | None = None) -> int:
    """Number of columns for a grid of ``count`` images: about square, at most 20.

    Where the labels take turns, each column has one label and each row one or several turns.
    """
    square = max(1, min(_MOST_COLUMNS, round(math.sqrt(count))))
    turn = len(set(labels or ()))
    if labels is None or not turn < count or turn > _MOST_COLUMNS:
        return square
    if any(label != labels[place % turn] for place, label in enumerate(labels)):
        return square
    return turn * max(1, min(_MOST_COLUMNS // turn, round(square / turn)))


def save_grid(
    images: NDArray[np.uint8], path: Path, columns: int, labels: Sequence[str] | None = None
) -> None:
    """Write images as one PNG, see :func:`grid_of`; the file is replaced if it exists.

    Raises:
        OutputError: if the file cannot be written.
    """
    grid = grid_of(images, columns, labels)
    with atomic_file(path) as temporary:
        grid.save(temporary, format="PNG")


def grid_of(images: NDArray[np.uint8], columns: int, labels: Sequence[str] | None = None) -> Image.Image:
    """Arrange images in a grid, each with its label above; small ones are enlarged by an integer factor.

    Args:
        images: uint8 [N, H, W, C], N at least 1, C from 1 to 4 (2 and 4: the last is the opacity).
        columns: images per row.
        labels: one text per image, cut to the width of the image.
    """
    from PIL import Image, ImageDraw, ImageFont

    count, height, width, channels = images.shape
    factor = max(1, -(-_SMALLEST_TILE // min(height, width)))
    header = 0 if labels is None else _LABEL_HEIGHT
    cell_height, cell_width = height * factor + header + _GAP, width * factor + _GAP
    columns = min(columns, count)
    size = (columns * cell_width + _GAP, -(-count // columns) * cell_height + _GAP)
    grid = Image.new(MODES[channels], size, "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(_FONT_SIZE)
    for index, pixels in enumerate(images):
        left, top = _GAP + index % columns * cell_width, _GAP + index // columns * cell_height
        if labels is not None:
            draw.text((left, top), _fitted(labels[index], font, width * factor), fill="black", font=font)
        tile = to_pillow(pixels).resize((width * factor, height * factor), Image.Resampling.NEAREST)
        grid.paste(tile, (left, top + header))
    return grid


def _fitted(text: str, font: FreeTypeFont | ImageFont, width: int) -> str:
    """The first line of a label, cut to ``width`` pixels."""
    text = " ".join(text.split())
    if len(text) <= width and font.getlength(text) <= width:
        return text
    # A character has at least one pixel; widths of prefixes increase, so bisect.
    longest = bisect_right(
        range(min(len(text), width)), width, key=lambda end: math.ceil(font.getlength(f"{text[:end]}…"))
    )
    return f"{text[: max(longest - 1, 0)]}…"
