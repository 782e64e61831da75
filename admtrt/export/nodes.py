"""Queries on nodes for passes and gradient rules: attributes, shapes, transposes of two axes."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any

from admtrt.contract import NODE_SCOPES
from admtrt.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir


ATEN = "aten"
"""Key of a node's ``meta``: the PyTorch function that the node was captured from, such as ``max.dim``."""


LOSS = "admtrt.loss"
"""Metadata key of nodes that belong to a guide's loss, forward or backward; they compute in float32."""


TILING: dict[str, Any] = {
    "mode": "nearest",
    "coordinate_transformation_mode": "asymmetric",
    "nearest_mode": "floor",
}
"""The one form of Resize in which position i is a copy of position floor(i / factor), for every factor."""


def module_of(node: ir.Node) -> str:
    """`` in the module '0.conv'``, for messages; empty if the module is unknown."""
    try:
        path = str(ast.literal_eval(node.metadata_props[NODE_SCOPES])[-2])
    except (KeyError, IndexError, TypeError, ValueError, SyntaxError):
        return ""
    path = re.sub(r"^(module(\.|$))+", "", path)  # the exporter's own wrappers
    return f" in the module '{path}'" if path else ""


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """A whole-number attribute."""
    return node.attributes[name].as_int() if name in node.attributes else default


def ints_attribute(node: ir.Node, name: str, default: Sequence[int]) -> list[int]:
    """An attribute that lists whole numbers."""
    return list(node.attributes[name].as_ints()) if name in node.attributes else list(default)


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """A floating-point attribute."""
    return node.attributes[name].as_float() if name in node.attributes else default


def swapped_last(rank: int) -> list[int]:
    """The permutation that swaps the last two axes."""
    return [*range(rank - 2), rank - 1, rank - 2]


def swaps_last(transpose: ir.Node, rank: int) -> bool:
    """True if a Transpose swaps the last two axes. Without ``perm`` it reverses all axes."""
    return ints_attribute(transpose, "perm", range(rank - 1, -1, -1)) == swapped_last(rank)


def shape_of(value: ir.Value) -> ir.Shape:
    """The shape of a value.

    Raises:
        ExportError: naming the value, if its shape is unknown.
    """
    if value.shape is None:
        raise ExportError(f"the shape of '{value.name}' is unknown; the graph cannot be differentiated")
    return value.shape


def input_of(node: ir.Node, index: int) -> ir.Value:
    """An input that the operator requires."""
    value = node.inputs[index]
    assert value is not None
    return value


def dims_of(value: ir.Value) -> list[int | None]:
    """Sizes, None where dynamic."""
    return [dim if isinstance(dim, int) else None for dim in shape_of(value)]


def enlargement_of(resize: ir.Node) -> list[int] | None:
    """The integer factors of a nearest-neighbour upsampling, one per spatial axis."""
    text = {name: attribute.as_string() for name, attribute in resize.attributes.items() if name in TILING}
    sizes, out_sizes = (dims_of(value)[2:] for value in (input_of(resize, 0), resize.outputs[0]))
    pairs = [(a, b) for a, b in zip(sizes, out_sizes, strict=True) if a is not None and b is not None]
    if text != TILING or len(pairs) != len(sizes) or any(b % a for a, b in pairs):
        return None
    factors = [b // a for a, b in pairs]
    scales = resize.inputs[2] if len(resize.inputs) > 2 else None  # the sizes may be rounded down from these
    if scales is not None and scales.const_value is None:
        return None
    if scales is not None and scales.const_value is not None and scales.const_value.size:
        given = scales.const_value.numpy()
        return factors if given.tolist() == [1, 1, *factors] else None
    return factors
