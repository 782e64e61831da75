"""Reductions, pooling and resizing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from admtrt.errors import ExportError
from admtrt.export.nodes import int_attribute, ints_attribute
from admtrt.export.vjp.layout import pad
from admtrt.export.vjp.rule import (
    axes_of,
    dims_of,
    input_of,
    only,
    rule,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admtrt.export.tape import Tape
    from admtrt.export.vjp.rule import Gradients


def _spread(tape: Tape, node: ir.Node, gradient: ir.Value) -> ir.Value:
    """A reduction's gradient with the reduced axes back, at size 1."""
    if int_attribute(node, "keepdims", 1):
        return gradient
    return tape.op("Unsqueeze", gradient, tape.ints(*axes_of(node)))


def _expand(tape: Tape, value: ir.Value, like: ir.Value, axes: Sequence[int]) -> ir.Value:
    dims = dims_of(like)
    if any(dims[axis] is None for axis in axes):
        return tape.op("Expand", value, tape.op("Shape", like))
    # Size 1 leaves an axis as it is, so the batch needs no mention.
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
    """Shared evenly among all that are equal to the largest, as in PyTorch's amax."""
    x, g = input_of(node, 0), _spread(tape, node, only(incoming))
    assert x.dtype is not None
    taken = tape.cast(tape.op("Equal", x, _spread(tape, node, node.outputs[0])), x.dtype)
    count = tape.op("ReduceSum", taken, tape.ints(*axes_of(node)), keepdims=1)
    return [tape.op("Mul", taken, tape.op("Div", g, count)), *([None] * (len(node.inputs) - 1))]


@rule("ReduceSumSquare", "ReduceL2")
def _reduce_squares(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    x = input_of(node, 0)
    g = _spread(tape, node, only(incoming))
    if node.op_type == "ReduceL2":
        norm = _spread(tape, node, node.outputs[0])
        zero = tape.scalar(0.0, x)  # the subgradient at 0 that PyTorch takes
        g = tape.op("Where", tape.op("Greater", norm, zero), tape.op("Div", g, norm), zero)
    else:
        g = tape.op("Mul", g, tape.scalar(2.0, x))
    return [tape.op("Mul", g, x), *([None] * (len(node.inputs) - 1))]


@rule("ReduceLogSumExp")
def _reduce_log_sum_exp(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    x = input_of(node, 0)
    weights = tape.op("Exp", tape.op("Sub", x, _spread(tape, node, node.outputs[0])))
    g = _spread(tape, node, only(incoming))
    return [tape.op("Mul", weights, g), *([None] * (len(node.inputs) - 1))]


@rule("GlobalAveragePool")
def _global_average_pool(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    x = input_of(node, 0)
    dims = dims_of(x)
    spatial = list(range(2, len(dims)))
    count = math.prod(dims[axis] or 0 for axis in spatial)
    if not count:
        raise ExportError(f"GlobalAveragePool '{node.name}' averages over an axis of unknown size")
    return [_expand(tape, tape.op("Mul", only(incoming), tape.scalar(1 / count, x)), x, spatial)]


def _windows(node: ir.Node, *, exact: bool) -> tuple[list[int], list[int], list[int]]:
    """How many windows of a pooling tile each axis, their sizes, and what is left over at the ends.

    Raises:
        ExportError: if they do not tile the image, or ``exact`` is asked for and something is left over.
    """
    kernel = ints_attribute(node, "kernel_shape", ())
    strides = ints_attribute(node, "strides", [1] * len(kernel))
    tiled = (
        strides == kernel
        and not any(ints_attribute(node, "pads", [0]))
        and not int_attribute(node, "ceil_mode", 0)
        and set(ints_attribute(node, "dilations", [1])) == {1}
    )
    sizes = [size or 0 for size in dims_of(input_of(node, 0))[2:]]
    rest = [size % k for size, k in zip(sizes, kernel, strict=True)]
    if not tiled or not all(sizes) or (exact and any(rest)):
        raise ExportError(
            f"{node.op_type} '{node.name}' has windows that overlap, pad or do not tile the image"
        )
    return [size // k for size, k in zip(sizes, kernel, strict=True)], kernel, rest


@rule("MaxPool")
def _max_pool(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """All to the first of a window's largest, as in PyTorch: a one-hot product over windows, no scatter."""
    x, (counts, kernel, _) = input_of(node, 0), _windows(node, exact=True)
    g, rank = only(incoming), len(kernel)
    assert x.dtype is not None
    apart = [size for pair in zip(counts, kernel, strict=True) for size in pair]
    windows_last = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2)]
    windows = tape.op("Transpose", tape.op("Reshape", x, tape.ints(-1, *apart)), perm=windows_last)
    windows = tape.op("Reshape", windows, tape.ints(-1, *counts, math.prod(kernel)))
    taken = tape.op("ArgMax", windows, axis=-1, keepdims=1)
    chosen = tape.cast(tape.op("Equal", taken, tape.array(np.arange(math.prod(kernel)))), x.dtype)
    spread = tape.op("Mul", chosen, tape.op("Reshape", g, tape.ints(-1, *counts, 1)))
    back = tape.op("Reshape", spread, tape.ints(-1, *counts, *kernel))
    back = tape.op("Transpose", back, perm=[windows_last.index(axis) for axis in range(2 * rank + 1)])
    return [tape.reshape_like(back, x)]


@rule("AveragePool")
def _average_pool(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Windows that tile the image: every position gets its window's share, a nearest resize.

    What is left over at the ends, where an odd size is halved, gets nothing.
    """
    _, kernel, rest = _windows(node, exact=False)
    g = only(incoming)
    share = tape.op("Mul", g, tape.scalar(1 / math.prod(kernel), input_of(node, 0)))
    spread = _nearest(tape, share, kernel)
    return [pad(tape, spread, [0] * (2 + len(rest)), [0, 0, *rest])]


_TILING: dict[str, Any] = {
    "mode": "nearest",
    "coordinate_transformation_mode": "asymmetric",
    "nearest_mode": "floor",
}
"""The one form of Resize in which position i is a copy of position floor(i / factor), for every factor."""


def _nearest(tape: Tape, value: ir.Value, factors: Sequence[int]) -> ir.Value:
    scales = tape.array(np.array([1, 1, *factors], np.float32))
    return tape.op("Resize", value, None, scales, **_TILING)


def enlargement_of(resize: ir.Node) -> list[int] | None:
    """The whole factors of a nearest-neighbour enlargement, one for each axis behind the channels."""
    text = {name: attribute.as_string() for name, attribute in resize.attributes.items() if name in _TILING}
    sizes, out_sizes = (dims_of(value)[2:] for value in (input_of(resize, 0), resize.outputs[0]))
    pairs = [(a, b) for a, b in zip(sizes, out_sizes, strict=True) if a is not None and b is not None]
    if text != _TILING or len(pairs) != len(sizes) or any(b % a for a, b in pairs):
        return None
    factors = [b // a for a, b in pairs]
    scales = resize.inputs[2] if len(resize.inputs) > 2 else None  # from which sizes were rounded down
    if scales is not None and scales.const_value is None:
        return None
    if scales is not None and scales.const_value is not None and scales.const_value.size:
        given = scales.const_value.numpy()
        return factors if given.tolist() == [1, 1, *factors] else None
    return factors


@rule("Resize")
def _resize(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Nearest-neighbour enlargement by whole factors: sums over tiles."""
    factors = enlargement_of(node)
    if factors is None:
        raise ExportError(f"Resize '{node.name}' is no nearest-neighbour enlargement by whole factors")
    pooled = tape.op("AveragePool", only(incoming), kernel_shape=factors, strides=factors)
    share = tape.scalar(math.prod(factors), input_of(node, 0))
    return [tape.op("Mul", pooled, share), *([None] * (len(node.inputs) - 1))]
