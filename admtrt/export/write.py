"""Graph -> file, with its weights beside it where they are large."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from admtrt.files import atomic_directory, atomic_file

if TYPE_CHECKING:
    from pathlib import Path

EXTERNAL_THRESHOLD = 64 * 2**20
"""Bytes of weights above which they go to a file of their own (protocol buffers end at 2 GiB)."""


def write_graph(model: ir.Model, path: Path) -> None:
    """Write ``path`` and, where its weights exceed :data:`EXTERNAL_THRESHOLD`, ``path.data`` beside it."""
    values = [value.const_value for value in model.graph.initializers.values()]
    large = sum(tensor.nbytes for tensor in values if tensor is not None) > EXTERNAL_THRESHOLD
    path.parent.mkdir(parents=True, exist_ok=True)
    if not large:
        with atomic_file(path) as temporary:
            ir.save(model, temporary)
        return
    data = f"{path.name}.data"
    with atomic_directory(path.with_name(f"{path.name}.parts"), overwrite=True) as parts:
        ir.save(model, parts / path.name, external_data=data, size_threshold_bytes=1024)
        # Data first: a graph that stands at its place never points to data that are not there.
        (parts / data).replace(path.with_name(data))
        (parts / path.name).replace(path)
    path.with_name(f"{path.name}.parts").rmdir()
