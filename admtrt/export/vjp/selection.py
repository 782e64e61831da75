"""Gradient rules of gathers and scatters.

With g the gradient of the output. A sum "at the indices" is 0 where no index points:

- Gather, GatherElements, GatherND: dx = g summed at the indices
- TopK: dx = the gradient of the values, at the returned indices
- ScatterElements, ScatterND: d(written) = g at the indices; d(data) = g, 0 where it was overwritten

For indices along one axis of known size, the gradient is a product with a one-hot matrix, which engines run
well. For other indices it is a scatter with addition.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from admtrt.errors import ExportError
from admtrt.export.nodes import dims_of, input_of, int_attribute
from admtrt.export.vjp.rule import only, rule
from admtrt.export.vjp.sampling import along, selection

if TYPE_CHECKING:
    from admtrt.export.tape import Tape
    from admtrt.export.vjp.rule import Gradients


@rule("Gather")
def _gather(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Selection along an axis: zero padding for a single constant index, else a matrix product."""
    g, x, indices = only(incoming), input_of(node, 0), input_of(node, 1)
    dims, rank = dims_of(x), len(dims_of(x))
    axis = int_attribute(node, "axis", 0) % rank
    size = dims[axis]
    if size is None:
        raise ExportError(f"Gather '{node.name}' selects along an axis of unknown size")
    shape = dims_of(indices)
    if len(shape) != 1:
        count = None if None in shape else math.prod(size or 0 for size in shape)
        merged = [*dims[:axis], count, *dims[axis + 1 :]]
        if merged.count(None) > 1:
            raise ExportError(f"Gather '{node.name}' selects at places of unknown number")
        g = tape.op("Reshape", g, tape.ints(*[-1 if length is None else length for length in merged]))
    if indices.const_value is None:
        chosen = _one_hot(tape, tape.op("Reshape", indices, tape.ints(-1, 1)), size, g)
        return [_along_computed(tape, g, axis, rank, chosen), None]
    places = indices.const_value.numpy().reshape(-1) % size
    if len(places) == 1:
        before, after = [0] * rank, [0] * rank
        before[axis], after[axis] = int(places[0]), size - 1 - int(places[0])
        return [tape.padded(g, before, after), None]
    return [along(tape, g, axis, rank, selection(places, size)), None]


def _one_hot(tape: Tape, places: ir.Value, size: int, like: ir.Value) -> ir.Value:
    """[..., K, 1] -> one-hot [..., K, size]. Negative indices count from the end."""
    assert like.dtype is not None
    numbers = np.arange(size)
    found = [tape.op("Equal", places, tape.array(numbers - back)) for back in (0, size)]
    return tape.cast(tape.op("Or", *found), like.dtype)


def _along_computed(tape: Tape, value: ir.Value, axis: int, rank: int, matrix: ir.Value) -> ir.Value:
    """The sum over j of value[..., j, ...] matrix[j, i], for a computed matrix."""
    last = [a for a in range(rank) if a != axis] + [axis]
    if axis == rank - 1:
        return tape.op("MatMul", value, matrix)
    product = tape.op("MatMul", tape.op("Transpose", value, perm=last), matrix)
    return tape.op("Transpose", product, perm=[last.index(a) for a in range(rank)])


@rule("GatherND")
def _gather_nd(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Flatten constant indices along the first axes to one axis, as in a Gather; others use a scatter."""
    g, x, indices = only(incoming), input_of(node, 0), input_of(node, 1)
    if int_attribute(node, "batch_dims", 0):
        raise ExportError(f"GatherND '{node.name}' selects within a batch")
    depth = dims_of(indices)[-1]
    assert depth is not None
    first = dims_of(x)[:depth]
    sizes = [size for size in first if size is not None]
    if indices.const_value is None:
        zeros = tape.op("Expand", tape.scalar(0.0, x), tape.op("Shape", x))
        return [tape.op("ScatterND", zeros, indices, g, reduction="add"), None]
    if len(sizes) != len(first):
        raise ExportError(f"GatherND '{node.name}' selects along an axis of unknown size")
    constant = indices.const_value.numpy()
    wrapped = np.moveaxis(constant % np.array(sizes), -1, 0).reshape(len(sizes), -1)
    places = np.ravel_multi_index(tuple(wrapped), sizes)
    flat = tape.op("Reshape", g, tape.ints(len(places), -1))
    return [tape.reshape_like(along(tape, flat, 0, 2, selection(places, math.prod(sizes))), x), None]


@rule("ScatterND")
def _scatter_nd(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Written values get the gradient at their indices; overwritten values get none."""
    g, data, indices, written = only(incoming), *(input_of(node, index) for index in range(3))
    kept = g
    if _reduction(node) == "none" and data in tape.active:
        zeros = tape.op("Expand", tape.scalar(0.0, data), tape.op("Shape", written))
        kept = tape.op("ScatterND", g, indices, zeros)
    return [kept, None, tape.op("GatherND", g, indices)]


def _reduction(node: ir.Node) -> str:
    """The reduction of a scatter: none or add.

    Raises:
        ExportError: for any other reduction.
    """
    reduction = node.attributes["reduction"].as_string() if "reduction" in node.attributes else "none"
    if reduction not in ("none", "add"):
        raise ExportError(
            f"{node.op_type} '{node.name}' writes by '{reduction}'",
            hint="Reduce with amax, amin or prod, and write or add what that gives.",
        )
    return reduction


@rule("GatherElements")
def _gather_elements(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Selection along an axis, such as a label's score."""
    axis = int_attribute(node, "axis", 0) % len(dims_of(input_of(node, 0)))
    return [_put_at(tape, node, only(incoming), input_of(node, 1), axis), None]


@rule("TopK")
def _top_k(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """The values were selected along an axis at the indices that TopK also returns."""
    axis = int_attribute(node, "axis", -1) % len(dims_of(input_of(node, 0)))
    return [_put_at(tape, node, only(incoming), node.outputs[1], axis), None]


@rule("ScatterElements")
def _scatter_elements(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Written values get the gradient at their indices; overwritten values get none."""
    g, data, indices = only(incoming), input_of(node, 0), input_of(node, 1)
    axis = int_attribute(node, "axis", 0) % len(dims_of(data))
    reduction = _reduction(node)
    kept = g
    if reduction == "none" and data in tape.active:
        one, zero = tape.scalar(1.0, data), tape.scalar(0.0, data)
        written = _put_at(tape, node, tape.op("Expand", one, tape.op("Shape", indices)), indices, axis)
        kept = tape.op("Where", tape.op("Greater", written, zero), zero, g)
    return [kept, None, tape.op("GatherElements", g, indices, axis=axis)]


def _put_at(tape: Tape, node: ir.Node, values: ir.Value, indices: ir.Value, axis: int) -> ir.Value:
    """Sum values at indices along an axis of a node's first input: a one-hot product, no scatter.

    Along the other axes, the indices may cover only the first positions.
    """
    x = input_of(node, 0)
    dims, own, rank = dims_of(x), dims_of(indices), len(dims_of(x))
    size = dims[axis]
    after = [0] * rank
    for other in range(rank):
        if other != axis and dims[other] != own[other]:
            whole, part = dims[other], own[other]
            if whole is None or part is None:
                raise ExportError(
                    f"{node.op_type} '{node.name}' selects from a part of an axis of unknown size"
                )
            after[other] = whole - part
    if size is None:
        raise ExportError(f"{node.op_type} '{node.name}' selects along an axis of unknown size")
    if own[axis] == 1:
        put = tape.op("Mul", tape.one_hot(indices, x, axis), values)
        return tape.padded(put, [0] * rank, after)
    last = [a for a in range(rank) if a != axis] + [axis]
    if axis != rank - 1:
        indices, values = (tape.op("Transpose", v, perm=last) for v in (indices, values))
    assert x.dtype is not None
    places = tape.op("Equal", tape.op("Unsqueeze", indices, tape.ints(rank)), tape.array(np.arange(size)))
    rows = tape.op("Unsqueeze", values, tape.ints(rank - 1))
    put = tape.op("Squeeze", tape.op("MatMul", rows, tape.cast(places, x.dtype)), tape.ints(rank - 1))
    if axis != rank - 1:
        put = tape.op("Transpose", put, perm=[last.index(a) for a in range(rank)])
    return tape.padded(put, [0] * rank, after)
