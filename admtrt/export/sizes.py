"""Fold shape arithmetic that does not depend on the batch into constants.

PyTorch's decompositions compute sizes at run time even if the example fixed them. The shapes that follow are
then unknown, and gradient rules need known shapes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from admtrt.export.nodes import int_attribute
from admtrt.export.passes import constant

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Numbers = NDArray[Any]  # integers; None if it depends on the batch

_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else None,
}


def compute_sizes(model: ir.Model) -> bool:
    """Replace known sizes by constants. Returns whether there were any."""
    known: dict[ir.Value, Numbers] = {}
    changed = False
    for node in model.graph:
        numbers = _numbers(node, known)
        if numbers is not None:
            out = node.outputs[0]
            known[out] = numbers
            if (
                all(number is not None for number in numbers.flat)
                and out.uses()
                and not out.is_graph_output()
            ):
                made = constant(model.graph, numbers.astype(np.int64))
                out.replace_all_uses_with(made)
                known[made] = numbers
                changed = True
        elif node.op_type == "Reshape":
            changed |= _fix_target(model, node, known)
    return changed


def _fix_target(model: ir.Model, reshape: ir.Node, known: dict[ir.Value, Numbers]) -> bool:
    """A Reshape target with one size that depends on the batch -> a constant with -1 for that size."""
    target, out = reshape.inputs[1], reshape.outputs[0]
    numbers = None if target is None or target.const_value is not None else known.get(target)
    if numbers is None or list(numbers).count(None) != 1 or 0 in numbers or -1 in numbers:
        return False
    sizes = [-1 if number is None else int(number) for number in numbers]
    reshape.replace_input_with(1, constant(model.graph, np.array(sizes, np.int64)))
    if out.shape is not None and len(out.shape) == len(sizes):
        out.shape = ir.Shape(
            [old if size == -1 else size for size, old in zip(sizes, out.shape, strict=True)]
        )
    return True


def _numbers(node: ir.Node, known: dict[ir.Value, Numbers]) -> Numbers | None:
    """The result of a node that computes sizes; None for other nodes."""
    if node.op_type == "Shape":
        value = node.inputs[0]
        if value is None or value.shape is None:
            return None
        sizes = [size if isinstance(size, int) else None for size in value.shape]
        start, end = int_attribute(node, "start", 0), int_attribute(node, "end", len(sizes))
        return np.array(sizes[start:end], object)
    given = [_read(value, known) for value in node.inputs]
    if not given or given[0] is None or not any(value in known for value in node.inputs):
        return None
    if node.op_type in ("Identity", "Cast") and node.outputs[0].dtype == ir.DataType.INT64:
        return given[0]
    if node.op_type in ("Squeeze", "Unsqueeze", "Reshape"):
        rank = node.outputs[0].shape
        if rank is None or len(rank) > 1 or given[0].size != 1:
            return None
        return given[0].reshape((1,) * len(rank))
    if any(value is None for value in given):
        return None
    inputs = [value for value in given if value is not None]
    if node.op_type in _ARITHMETIC and all(value.ndim <= 1 for value in inputs):
        operation = _ARITHMETIC[node.op_type]
        pairs = np.broadcast(*inputs)
        results = [None if a is None or b is None else operation(a, b) for a, b in pairs]
        return np.array(results, object).reshape(pairs.shape)
    if any(None in value for value in inputs[1:]) and node.op_type != "Concat":
        return None
    if node.op_type == "Concat" and all(value.ndim == 1 for value in inputs):
        return np.concatenate(inputs)
    if node.op_type == "Gather" and inputs[0].ndim == 1:
        return np.asarray(inputs[0][inputs[1].astype(np.int64)], object)
    if node.op_type == "Slice" and inputs[0].ndim == 1 and len(inputs) > 2:
        start, end = int(inputs[1].item()), int(inputs[2].item())
        step = int(inputs[4].item()) if len(inputs) > 4 else 1
        return inputs[0][start:end:step]
    return None


def _read(value: ir.Value | None, known: dict[ir.Value, Numbers]) -> Numbers | None:
    if value is None:
        return None
    if value.const_value is not None and value.const_value.dtype == ir.DataType.INT64:
        return value.const_value.numpy().astype(object)
    return known.get(value)
