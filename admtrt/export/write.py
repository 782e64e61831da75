"""Graph -> file, with its weights beside it where they are large."""

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
"""Bytes of weights above which they go to a file of their own (protocol buffers end at 2 GiB)."""


def write_graph(
    model: ir.Model,
    path: Path,
    check: Callable[[Path], None] | None = None,
    shared: SharedWeights | None = None,
) -> None:
    """Write ``path`` and, where its weights exceed :data:`EXTERNAL_THRESHOLD`, ``path.data`` beside it.

    While a graph that stands there reads that file, its successor's is ``path.other.data``: whoever is killed
    leaves the old graph or the new one, with its own weights.

    Args:
        model: the graph.
        path: its place.
        check: given the written graph before it takes its place; what it raises leaves the place as it was.
        shared: weights of other graphs in the folder, which need not be written again.

    Raises:
        OutputError: if the place cannot be written.
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
        if large:  # first, and beside what an older graph reads: one that stands there always has its own
            own.replace(path.with_name(data))
        written.replace(path)
        for name in read & {f"{path.name}.data", f"{path.name}.other.data"}:
            path.with_name(name).unlink(missing_ok=True)


def _weights_of(path: Path) -> frozenset[str]:
    """The files that the graph at a place reads; none where there is no graph."""
    try:
        return external_locations(path) if path.exists() else frozenset()
    except (BundleError, OSError):
        return frozenset()
