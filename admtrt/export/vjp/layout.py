"""Gradient rules of operators that move values: reshapes, slices, concatenations.

With g the gradient of the output and dx the gradient of the input:

- Reshape, Flatten, Squeeze, Unsqueeze: dx = g in the shape of x
- Transpose: dx = g transposed by the inverse permutation
- Expand: dx = g summed over the axes that were repeated
- Concat: dx = the part of g that x became. Split: dx = the gradients of the parts joined, 0 for a missing one
- Slice: dx = g padded with zeros
- Tile: dx = g summed over the copies
- DepthToSpace, SpaceToDepth: dx = g transformed by the other of the two
- Trilu: dx = the same triangle of g
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from admtrt.errors import ExportError
from admtrt.export.nodes import dims_of, input_of, int_attribute, ints_attribute, swaps_last
from admtrt.export.vjp.rule import ints_of, only, rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admtrt.export.tape import Tape
    from admtrt.export.vjp.rule import Gradients


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    back = tape.reshape_like(only(incoming), input_of(node, 0))
    return [back, *([None] * (len(node.inputs) - 1))]


@rule("Transpose")
def _transpose(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g, rank = only(incoming), len(dims_of(input_of(node, 0)))
    perm = ints_attribute(node, "perm", range(rank - 1, -1, -1))
    product = g.producer()
    if swaps_last(node, rank) and product is not None and product.op_type == "MatMul":
        # (A B)' = B' A': the factors are smaller than attention's product, and often already transposed.
        a, b = product.inputs
        if a is not None and b is not None and a.shape is not None and b.shape is not None:
            return [tape.op("MatMul", tape.swap_last(b), tape.swap_last(a))]
    return [tape.op("Transpose", g, perm=[perm.index(axis) for axis in range(rank)])]


@rule("Expand")
def _expand_rule(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    return [tape.sum_to(only(incoming), input_of(node, 0), node.outputs[0]), None]


@rule("Concat")
def _concat(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    axis = int_attribute(node, "axis", 0)
    sizes = [dims_of(input_of(node, index))[axis] for index in range(len(node.inputs))]
    if any(size is None for size in sizes):
        raise ExportError(f"Concat '{node.name}' joins along an axis of unknown size")
    split = tape.op(
        "Split", only(incoming), tape.ints(*[s for s in sizes if s]), outputs=len(sizes), axis=axis
    )
    producer = split.producer()
    assert producer is not None
    return list(producer.outputs)


@rule("Split")
def _split(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    parts = [
        g if g is not None else tape.op("Expand", tape.scalar(0.0, output), tape.op("Shape", output))
        for g, output in zip(incoming, node.outputs, strict=True)
    ]
    joined = tape.op("Concat", *parts, axis=int_attribute(node, "axis", 0))
    return [joined, *([None] * (len(node.inputs) - 1))]


@rule("Slice")
def _slice(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Pad with zeros (and interleave zeros for strides) instead of a scatter."""
    x, g = input_of(node, 0), only(incoming)
    dims, rank = dims_of(x), len(dims_of(x))
    cut = dims_of(node.outputs[0])
    starts, ends = ints_of(node, 1) or [], ints_of(node, 2) or []
    axes = ints_of(node, 3) or list(range(len(starts)))
    steps = ints_of(node, 4) or [1] * len(starts)
    before, after = [0] * rank, [0] * rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size, axis = dims[axis], axis % rank
        if size is None:
            raise ExportError(f"Slice '{node.name}' cuts an axis of unknown size")
        taken = range(*slice(start, end, step).indices(size))
        if step < 0:
            g, taken = _reversed(tape, g, axis), taken[::-1]
        if taken.step > 1 and len(taken):
            if cut.count(None) > 1:
                raise ExportError(f"Slice '{node.name}' has a stride and two axes of unknown size")
            cut[axis] = len(taken) * taken.step
            g = _spaced(tape, g, axis, taken.step, cut)
            g = _cropped(tape, g, axis, taken.step - 1)
            cut[axis] = taken[-1] + 1 - taken[0]
        first = taken[0] if taken else 0
        before[axis], after[axis] = first, size - first - (taken[-1] + 1 - first if taken else 0)
    return [tape.padded(g, before, after), *([None] * (len(node.inputs) - 1))]


def _reversed(tape: Tape, value: ir.Value, axis: int) -> ir.Value:
    last, beyond = tape.ints(-1), tape.ints(np.iinfo(np.int64).min)
    return tape.op("Slice", value, last, beyond, tape.ints(axis), tape.ints(-1))


def _cropped(tape: Tape, value: ir.Value, axis: int, count: int) -> ir.Value:
    """Remove the last positions of an axis."""
    return tape.op("Slice", value, tape.ints(0), tape.ints(-count), tape.ints(axis))


def _spaced(tape: Tape, value: ir.Value, axis: int, step: int, sizes: Sequence[int | None]) -> ir.Value:
    """Insert ``step`` - 1 zeros after every position of an axis; ``sizes`` is the resulting shape."""
    apart = tape.op("Unsqueeze", value, tape.ints(axis + 1))
    rank = len(sizes) + 1
    apart = tape.op("Pad", apart, tape.ints(*[0] * (rank + axis + 1), step - 1, *[0] * (rank - axis - 2)))
    return tape.op("Reshape", apart, tape.ints(*[-1 if size is None else size for size in sizes]))


@rule("Tile")
def _tile(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Sums over the copies."""
    dims, repeats = dims_of(input_of(node, 0)), ints_of(node, 1) or []
    dynamic = [count for size, count in zip(dims, repeats, strict=True) if size is None]
    if dynamic not in ([], [1]):
        raise ExportError(f"Tile '{node.name}' repeats an axis of unknown size")
    apart, copies = list[int](), list[int]()
    for size, count in zip(dims, repeats, strict=True):
        if count != 1:
            copies.append(len(apart))
            apart.append(count)
        apart.append(-1 if size is None else size)
    g = tape.op("Reshape", only(incoming), tape.ints(*apart))
    return [tape.op("ReduceSum", g, tape.ints(*copies), keepdims=0) if copies else g, None]


@rule("DepthToSpace")
def _depth_to_space(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Move blocks back into channels, first (DCR) or last (CRD, PyTorch's pixel shuffle)."""
    block = int_attribute(node, "blocksize", 1)
    _, channels, height, width = dims_of(node.outputs[0])
    if channels is None or height is None or width is None:
        raise ExportError(f"DepthToSpace '{node.name}' has an axis of unknown size")
    crd = "mode" in node.attributes and node.attributes["mode"].as_string() == "CRD"
    sizes = tape.ints(-1, channels, height // block, block, width // block, block)
    apart = tape.op("Reshape", only(incoming), sizes)
    moved = tape.op("Transpose", apart, perm=[0, 1, 3, 5, 2, 4] if crd else [0, 3, 5, 1, 2, 4])
    return [tape.reshape_like(moved, input_of(node, 0))]


@rule("SpaceToDepth")
def _space_to_depth(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    return [tape.op("DepthToSpace", only(incoming), blocksize=int_attribute(node, "blocksize", 1))]


@rule("Trilu")
def _trilu(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """The same triangle."""
    same = tape.op("Trilu", only(incoming), *node.inputs[1:], upper=int_attribute(node, "upper", 1))
    return [same, *([None] * (len(node.inputs) - 1))]
