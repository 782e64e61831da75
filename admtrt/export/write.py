"""Write a graph to a file, with large weights in a second file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import onnx_ir as ir

from admtrt.errors import BundleError
from admtrt.export.shared import SMALLEST
from admtrt.files import check_place, locked, temporary_folder
from admtrt.onnx_wire import external_locations

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from admtrt.export.shared import SharedWeights

EXTERNAL_THRESHOLD = 64 * 2**20
"""Weights of more bytes than this go to a file of their own (protocol buffers are limited to 2 GiB)."""


def write_graph(
    model: ir.Model,
    path: Path,
    check: Callable[[Path], None] | None = None,
    shared: SharedWeights | None = None,
) -> None:
    """Write ``path`` and, if the weights exceed :data:`EXTERNAL_THRESHOLD`, ``path.data`` beside it.

    If an existing graph uses that file, the new weights go to ``path.other.data``. A kill thus leaves either
    the old or the new graph, with its own weights.

    Args:
        model: the graph.
        path: where to write.
        check: called with the written graph before it replaces the old one; if it raises, nothing is
            replaced.
        shared: weights that other graphs in the folder have written.

    Raises:
        OutputError: if the path cannot be written.
    """
    values = [value.const_value for value in model.graph.initializers.values()]
    large = sum(tensor.nbytes for tensor in values if tensor is not None) > EXTERNAL_THRESHOLD
    check_place(path)
    with locked(path.parent), temporary_folder(path) as folder:
        read = _weights_of(path)
        data = next(name for name in (f"{path.name}.data", f"{path.name}.other.data") if name not in read)
        written = folder / path.name
        if large and shared is not None:
            shared.save(model, written, data, path.parent)
        else:
            ir.save(model, written, external_data=data if large else None, size_threshold_bytes=SMALLEST)
        own = written.with_name(data)
        large = own.exists()
        if check is not None:
            check(written)
        for file in (written, own) if large else (written,):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if large:  # first, and never over the weights of the existing graph
            own.replace(path.with_name(data))
        written.replace(path)
        for name in read & {f"{path.name}.data", f"{path.name}.other.data"}:
            path.with_name(name).unlink(missing_ok=True)


def _weights_of(path: Path) -> frozenset[str]:
    """The weight files of the graph at a path; empty if there is no graph."""
    try:
        return external_locations(path) if path.exists() else frozenset()
    except (BundleError, OSError):
        return frozenset()
