"""Sizes of values in ONNX files that were read as protobuf."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def dims_of_value(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    """Its sizes, names where they are dynamic, 0 where nothing is known."""
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


def sizes_of_value(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Its sizes, 0 where they are not fixed."""
    return tuple(dim if isinstance(dim, int) else 0 for dim in dims_of_value(value))
