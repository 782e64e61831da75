"""Graph -> file, with its weights beside it where they are large."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from admtrt.errors import OutputError
from admtrt.files import check_place

if TYPE_CHECKING:
    from collections.abc import Callable

EXTERNAL_THRESHOLD = 64 * 2**20
"""Bytes of weights above which they go to a file of their own (protocol buffers end at 2 GiB)."""


def write_graph(model: ir.Model, path: Path, check: Callable[[Path], None] | None = None) -> None:
    """Write ``path`` and, where its weights exceed :data:`EXTERNAL_THRESHOLD`, ``path.data`` beside it.

    Args:
        model: the graph.
        path: its place.
        check: given the written graph before it takes its place; what it raises leaves the place as it was.

    Raises:
        OutputError: if the place cannot be written.
    """
    values = [value.const_value for value in model.graph.initializers.values()]
    large = sum(tensor.nbytes for tensor in values if tensor is not None) > EXTERNAL_THRESHOLD
    data = f"{path.name}.data" if large else None
    check_place(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            written = Path(folder, path.name)
            ir.save(model, written, external_data=data, size_threshold_bytes=1024)
            if check is not None:
                check(written)
            for file in written.parent.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            if data is not None:  # first: a graph that stands at its place never points to data that do not
                written.with_name(data).replace(path.with_name(data))
            written.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
