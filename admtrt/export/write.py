"""Graph -> file, with its weights beside it where they are large."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir

from admtrt.errors import OutputError
from admtrt.files import atomic_file

EXTERNAL_THRESHOLD = 64 * 2**20
"""Bytes of weights above which they go to a file of their own (protocol buffers end at 2 GiB)."""


def write_graph(model: ir.Model, path: Path) -> None:
    """Write ``path`` and, where its weights exceed :data:`EXTERNAL_THRESHOLD`, ``path.data`` beside it.

    Raises:
        OutputError: if the place cannot be written.
    """
    values = [value.const_value for value in model.graph.initializers.values()]
    large = sum(tensor.nbytes for tensor in values if tensor is not None) > EXTERNAL_THRESHOLD
    if not large:
        with atomic_file(path) as temporary:
            ir.save(model, temporary)
        return
    data = f"{path.name}.data"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            parts = Path(folder)
            ir.save(model, parts / path.name, external_data=data, size_threshold_bytes=1024)
            # Data first: a graph that stands at its place never points to data that are not there.
            (parts / data).replace(path.with_name(data))
            (parts / path.name).replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
