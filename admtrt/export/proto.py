"""Shapes of values in ONNX files that were read as protobuf."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def dims_of_value(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    """Its sizes: names if dynamic, 0 if unknown."""
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


def sizes_of_value(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Its sizes, 0 if not fixed."""
    return tuple(dim if isinstance(dim, int) else 0 for dim in dims_of_value(value))
