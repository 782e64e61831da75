"""Images for tests of training data: generating, writing and reading them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from admtrt.run_config import DataConfig

RNG = np.random.default_rng(0)


def config(source: Path | str, **overrides) -> DataConfig:
    return DataConfig(**{"source": str(source), "image_size": 8, "channels": 3, **overrides})


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(8, 8) if pixels is None else pixels).save(path)
    return path


def as_uint8(image: np.ndarray) -> np.ndarray:
    """Convert [C, H, W] in [-1, 1] back to the original uint8 [H, W, C]."""
    return np.rint((image.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)


def image(data, index: int = 0) -> np.ndarray:
    return data.image(index, np.random.default_rng(0))
