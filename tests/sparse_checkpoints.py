"""Checkpoints of published sizes as sparse files, which take no disk space."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def zeros_file(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A .safetensors file of float32 zeros, whose tensors are a hole in the file."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": (start, end)}
    described = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        file.truncate(file.tell() + end)
    return path
