"""Queries of passes and gradient rules: attributes, shapes, transposes of two axes."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

from admtrt.contract import NODE_SCOPES
from admtrt.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir


ATEN = "aten"
"""Key of a node's ``meta``: the function of PyTorch that a captured node is from, such as ``max.dim``."""


LOSS = "admtrt.loss"
"""Metadata of a node that belongs to a guide's loss, forward or backward; it computes in float32."""


def module_of(node: ir.Node) -> str:
    """`` in the module '0.conv'`` for messages; empty where nothing is known."""
    try:
        path = str(ast.literal_eval(node.metadata_props[NODE_SCOPES])[-2])
    except (KeyError, IndexError, TypeError, ValueError, SyntaxError):
        return ""
    path = re.sub(r"^(module(\.|$))+", "", path)  # of the exporter's own wrappers
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
    """True where a Transpose swaps the last two axes; without the attribute it reverses all."""
    return ints_attribute(transpose, "perm", range(rank - 1, -1, -1)) == swapped_last(rank)


def shape_of(value: ir.Value) -> ir.Shape:
    """A shape that has to be known.

    Raises:
        ExportError: naming the value, if it is not.
    """
    if value.shape is None:
        raise ExportError(f"the shape of '{value.name}' is unknown; the graph cannot be differentiated")
    return value.shape
