"""Gradient rules of reductions and running sums.

With y the output, g its gradient repeated along the reduced axes, and n the number of reduced values:

- ReduceSum: dx = g. ReduceMean, GlobalAveragePool: dx = g / n
- ReduceL1: dx = g sign x. ReduceL2: dx = g x / y, 0 where y = 0. ReduceSumSquare: dx = 2 g x
- ReduceMax, ReduceMin, GlobalMaxPool: dx = g / (values that equal y) where x = y; of torch.max(dim), all to
  the first
- ReduceLogSum: dx = g exp(-y). ReduceLogSumExp: dx = g exp(x - y)
- ReduceProd: dx = g (product of the others)
- CumSum: dx = the running sum of g from the other end
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from admtrt.errors import ExportError
from admtrt.export.kinks import first_of_equals
from admtrt.export.nodes import dims_of, input_of, int_attribute
from admtrt.export.vjp.rule import axes_of, constant_of, only, rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admtrt.export.tape import Tape
    from admtrt.export.vjp.rule import Gradients


def _spread(tape: Tape, node: ir.Node, gradient: ir.Value) -> ir.Value:
    """Restore the reduced axes of a reduction's gradient, with size 1."""
    if int_attribute(node, "keepdims", 1):
        return gradient
    return tape.op("Unsqueeze", gradient, tape.ints(*axes_of(node)))


def _expand(tape: Tape, value: ir.Value, like: ir.Value, axes: Sequence[int]) -> ir.Value:
    dims = dims_of(like)
    if any(dims[axis] is None for axis in axes):
        return tape.op("Expand", value, tape.op("Shape", like))
    # Expand keeps an axis for target size 1, so the batch needs no dynamic size.
    return tape.op(
        "Expand", value, tape.ints(*[size if axis in axes and size else 1 for axis, size in enumerate(dims)])
    )


@rule("ReduceSum", "ReduceMean")
def _reduce(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    x, axes = input_of(node, 0), axes_of(node)
    g = _spread(tape, node, only(incoming))
    if node.op_type == "ReduceMean":
        sizes = [dims_of(x)[axis] for axis in axes]
        if any(size is None for size in sizes):
            raise ExportError(f"ReduceMean '{node.name}' averages over an axis of unknown size")
        g = tape.op("Mul", g, tape.scalar(1 / math.prod(size for size in sizes if size), x))
    return [_expand(tape, g, x, axes), *([None] * (len(node.inputs) - 1))]


@rule("ReduceL1")
def _reduce_l1(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g = tape.op("Mul", _spread(tape, node, only(incoming)), tape.op("Sign", input_of(node, 0)))
    return [g, *([None] * (len(node.inputs) - 1))]


@rule("ReduceMax", "ReduceMin")
def _reduce_extremum(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Split evenly among equal maxima, as PyTorch's amax; or all to the first, as its max(dim)."""
    x, g = input_of(node, 0), _spread(tape, node, only(incoming))
    assert x.dtype is not None
    if first_of_equals(node) and dims_of(x)[axes_of(node)[0]] is not None:
        (axis,) = axes_of(node)
        first = tape.op("ArgMax" if node.op_type == "ReduceMax" else "ArgMin", x, axis=axis, keepdims=1)
        return [tape.op("Mul", tape.one_hot(first, x, axis), g), *([None] * (len(node.inputs) - 1))]
    taken = tape.cast(tape.op("Equal", x, _spread(tape, node, node.outputs[0])), x.dtype)
    count = tape.op("ReduceSum", taken, tape.ints(*axes_of(node)), keepdims=1)
    return [tape.op("Mul", taken, tape.op("Div", g, count)), *([None] * (len(node.inputs) - 1))]


@rule("ReduceSumSquare", "ReduceL2")
def _reduce_squares(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    x = input_of(node, 0)
    g = _spread(tape, node, only(incoming))
    if node.op_type == "ReduceL2":
        norm = _spread(tape, node, node.outputs[0])
        zero, one = tape.scalar(0.0, x), tape.scalar(1.0, x)
        positive = tape.op("Greater", norm, zero)
        divisor = tape.op("Where", positive, norm, one)  # no second derivative divides by 0 either
        g = tape.op("Where", positive, tape.op("Div", g, divisor), zero)  # PyTorch's subgradient at 0
    else:
        g = tape.op("Mul", g, tape.scalar(2.0, x))
    return [tape.op("Mul", g, x), *([None] * (len(node.inputs) - 1))]


@rule("ReduceLogSum")
def _reduce_log_sum(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Each value gets 1 / sum."""
    x = input_of(node, 0)
    share = tape.op("Mul", only(incoming), tape.op("Exp", tape.op("Neg", node.outputs[0])))
    back = _expand(tape, _spread(tape, node, share), x, axes_of(node))
    return [back, *([None] * (len(node.inputs) - 1))]


@rule("ReduceLogSumExp")
def _reduce_log_sum_exp(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    x = input_of(node, 0)
    weights = tape.op("Exp", tape.op("Sub", x, _spread(tape, node, node.outputs[0])))
    g = _spread(tape, node, only(incoming))
    return [tape.op("Mul", weights, g), *([None] * (len(node.inputs) - 1))]


@rule("GlobalMaxPool")
def _global_max_pool(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Split evenly among equal maxima."""
    x = input_of(node, 0)
    assert x.dtype is not None
    taken = tape.cast(tape.op("Equal", x, node.outputs[0]), x.dtype)
    count = tape.op("ReduceSum", taken, tape.ints(*range(2, len(dims_of(x)))), keepdims=1)
    return [tape.op("Mul", taken, tape.op("Div", only(incoming), count))]


@rule("GlobalAveragePool")
def _global_average_pool(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    x = input_of(node, 0)
    dims = dims_of(x)
    spatial = list(range(2, len(dims)))
    count = math.prod(dims[axis] or 0 for axis in spatial)
    if not count:
        raise ExportError(f"GlobalAveragePool '{node.name}' averages over an axis of unknown size")
    return [_expand(tape, tape.op("Mul", only(incoming), tape.scalar(1 / count, x)), x, spatial)]


@rule("ReduceProd")
def _reduce_prod(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """The product of the other values, without a division: values may be 0."""
    x, axes = input_of(node, 0), axes_of(node)
    rank, axis = len(dims_of(x)), axes[0]
    size = dims_of(x)[axis] if len(axes) == 1 else None
    if size is None:
        raise ExportError(f"ReduceProd '{node.name}' multiplies over several axes or one of unknown size")
    own = np.eye(size, dtype=bool).reshape(size, size, *[1] * (rank - axis - 1))
    without = tape.op("Where", tape.array(own), tape.scalar(1.0, x), tape.op("Unsqueeze", x, tape.ints(axis)))
    others = tape.op("ReduceProd", without, tape.ints(axis + 1), keepdims=0)
    g = _spread(tape, node, only(incoming))
    return [tape.op("Mul", others, g), *([None] * (len(node.inputs) - 1))]


@rule("CumSum")
def _cum_sum(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """The running sum from the other end."""
    exclusive, reverse = (int_attribute(node, name, 0) for name in ("exclusive", "reverse"))
    axis = constant_of(node, 1)
    assert axis is not None
    if dims_of(input_of(node, 0))[int(axis.item())] is None:
        raise ExportError(f"CumSum '{node.name}' adds up along an axis of unknown size")
    back = tape.op("CumSum", only(incoming), node.inputs[1], exclusive=exclusive, reverse=1 - reverse)
    return [back, None]
