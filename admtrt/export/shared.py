"""Store weights that several graphs of a folder share once, in the file of the first graph."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from onnx_ir import external_data

if TYPE_CHECKING:
    from pathlib import Path

SMALLEST = 1024
"""Weights of up to this many bytes stay in the graph's own file."""


class SharedWeights:
    """The weights written so far, by folder, type and hash: their file and offset."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, ir.DataType, str], tuple[str, int, int]] = {}

    def save(self, model: ir.Model, path: Path, data: str, folder: Path) -> None:
        """Write a graph, and its weights that no earlier graph of the folder has written.

        Args:
            model: the graph, which is not changed.
            path: path of the graph.
            data: the file beside it for its own weights; not written if there are none.
            folder: the folder in the bundle that the graph will be in.
        """
        values = [value for value in model.graph.initializers.values() if value.const_value is not None]
        kept = [value.const_value for value in values]
        own: list[ir.Value] = []
        keys = {}
        try:
            for value in values:
                tensor: Any = value.const_value
                if tensor.nbytes <= SMALLEST:
                    continue
                key = (folder, tensor.dtype, hashlib.sha256(tensor.tobytes()).hexdigest())
                if key in self._known:
                    value.const_value = _external(tensor, *self._known[key])
                else:
                    own.append(value)
                    keys[value] = key
            tensors = [value.const_value for value in own]
            if tensors:
                written = external_data.convert_tensors_to_external(tensors, path.parent, data)  # type: ignore[arg-type]
                for value, external in zip(own, written, strict=True):
                    value.const_value = external
                    assert external.offset is not None
                    assert external.length is not None
                    self._known[keys[value]] = (data, external.offset, external.length)
            ir.save(model, path)
        finally:
            for value, tensor in zip(values, kept, strict=True):
                value.const_value = tensor


def _external(tensor: Any, location: str, offset: int, length: int) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location, offset, length, tensor.dtype, shape=tensor.shape, name=tensor.name, base_dir=""
    )
