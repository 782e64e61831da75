"""Gradient rules of transforms: Fourier, sampling at computed positions, overlapping patches.

With g the gradient of the output and dx the gradient of the input:

- DFT of N values: dx = N times the inverse transform of g. Inverse DFT: dx = the transform of g / N
- Col2Im: dx = the patches of g
- GridSample: dx[i, j] = sum over positions p of g[p] row[p, i] column[p, j], where row and column are tent
  functions around p; the gradient of the positions has the slopes of the tents
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from admtrt.errors import ExportError
from admtrt.export.nodes import dims_of, input_of, int_attribute, ints_attribute
from admtrt.export.vjp.rule import constant_of, ints_of, only, rule

if TYPE_CHECKING:
    from admtrt.export.tape import Tape
    from admtrt.export.vjp.rule import Gradients


@rule("DFT")
def _dft(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """The transform in the other direction, with or without the factor 1 / N; the last axis is (re, im).

    For a onesided DFT, the omitted half of the gradient is zeros; for its inverse, the half that was
    reconstructed counts twice.
    """
    x, g, out = input_of(node, 0), only(incoming), node.outputs[0]
    rank = len(dims_of(x))
    inverse, onesided = int_attribute(node, "inverse", 0), int_attribute(node, "onesided", 0)
    given = constant_of(node, 2) if len(node.inputs) > 2 else None
    axis = (
        int_attribute(node, "axis", 1 if given is None else -2) if given is None else int(given.item())
    ) % rank
    long, short = (out, x) if inverse and onesided else (x, out)
    size, half = dims_of(long)[axis], dims_of(short)[axis]
    asked = ints_of(node, 1)
    if size is None or (asked or [size]) != [size]:
        raise ExportError(
            f"DFT '{node.name}' cuts or pads its signal, or has an axis of unknown size",
            hint="Cut or pad before the transform.",
        )

    def transformed(value: ir.Value, *, back: int, half: int = 0) -> ir.Value:
        at = {"axis": axis} if given is None else {}
        more = [] if given is None else [None, node.inputs[2]]
        return tape.op("DFT", value, *more, inverse=back, onesided=half, **at)

    if inverse and onesided:
        assert half is not None
        weights = np.full(half, 2 / size)
        weights[[0, -1] if size % 2 == 0 else [0]] = 1 / size
        shape = [-1 if a == axis else 1 for a in range(rank)]
        dtype = x.dtype
        assert dtype is not None
        factors = tape.array(weights.reshape(shape).astype(dtype.numpy()))
        back = tape.op("Mul", transformed(g, back=0, half=1), factors)
        return [back, *([None] * (len(node.inputs) - 1))]
    if onesided:
        assert half is not None
        g = tape.padded(g, [0] * rank, [size - half if a == axis else 0 for a in range(rank)])
    back = tape.op("Mul", transformed(g, back=1 - inverse), tape.scalar(1 / size if inverse else size, x))
    if dims_of(x)[-1] == 1:  # a real signal
        back = tape.op("Slice", back, tape.ints(0), tape.ints(1), tape.ints(rank - 1))
    return [back, *([None] * (len(node.inputs) - 1))]


@rule("Col2Im")
def _col2im(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """One strided slice of the image per position of a patch."""
    g, block = only(incoming), ints_of(node, 2)
    assert block is not None
    rank = len(block)
    strides, dilations = (ints_attribute(node, name, [1] * rank) for name in ("strides", "dilations"))
    pads = ints_attribute(node, "pads", [0] * (2 * rank))
    sizes, channels = dims_of(node.outputs[0])[2:], dims_of(node.outputs[0])[1]
    if channels is None or None in sizes:
        raise ExportError(f"Col2Im '{node.name}' has an axis of unknown size")
    padded = tape.padded(g, [0, 0, *pads[:rank]], [0, 0, *pads[rank:]])
    whole = [(size or 0) + pads[a] + pads[a + rank] for a, size in enumerate(sizes)]
    counts = [
        (w - d * (b - 1) - 1) // s + 1 for w, b, s, d in zip(whole, block, strides, dilations, strict=True)
    ]
    axes, steps = tape.ints(*range(2, 2 + rank)), tape.ints(*strides)
    parts = []
    for place in itertools.product(*map(range, block)):
        starts = [d * index for d, index in zip(dilations, place, strict=True)]
        ends = [first + (n - 1) * s + 1 for first, n, s in zip(starts, counts, strides, strict=True)]
        part = tape.op("Slice", padded, tape.ints(*starts), tape.ints(*ends), axes, steps)
        parts.append(tape.op("Unsqueeze", part, tape.ints(2)))
    joined = tape.op("Concat", *parts, axis=2)
    sized = tape.ints(-1, channels * math.prod(block), math.prod(counts))
    return [tape.op("Reshape", joined, sized), None, None]


@rule("GridSample")
def _grid_sample(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Bilinear sampling as a product with tent functions, one per row and one per column of x."""
    x, grid, g = input_of(node, 0), input_of(node, 1), only(incoming)
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "linear"
    padding = node.attributes["padding_mode"].as_string() if "padding_mode" in node.attributes else "zeros"
    dims, places = dims_of(x), dims_of(grid)
    if len(dims) != 4 or None in (*dims[1:], *places[1:]):
        raise ExportError(f"GridSample '{node.name}' samples no images of known size")
    if mode not in ("linear", "bilinear") or padding not in ("zeros", "border"):
        raise ExportError(
            f"no gradient rule for the operator 'GridSample' (node '{node.name}'), {mode} with {padding}",
            hint="Use mode='bilinear' with padding_mode 'zeros' or 'border'.",
        )
    channels, height, width = (size or 0 for size in dims[1:])
    rows, columns = (size or 0 for size in places[1:3])
    flat = tape.op("Reshape", grid, tape.ints(-1, rows * columns, 2))
    aligned = bool(int_attribute(node, "align_corners", 0))
    tents = []
    for coordinate, size in ((1, height), (0, width)):
        at = tape.op(
            "Slice", flat, tape.ints(coordinate), tape.ints(coordinate + 1), tape.ints(2)
        )  # [N, P, 1] in [-1, 1]
        scale, shift = ((size - 1) / 2, (size - 1) / 2) if aligned else (size / 2, (size - 1) / 2)
        at = tape.op("Add", tape.op("Mul", at, tape.scalar(scale, x)), tape.scalar(shift, x))
        slope = tape.scalar(scale, x)
        if padding == "border":
            low, high = tape.scalar(0.0, x), tape.scalar(size - 1.0, x)
            inside = tape.op("And", tape.op("Greater", at, low), tape.op("Less", at, high))
            slope = tape.op("Where", inside, slope, low)
            at = tape.op("Min", tape.op("Max", at, low), high)
        assert x.dtype is not None
        apart = tape.op("Sub", tape.array(np.arange(size, dtype=x.dtype.numpy())), at)  # [N, P, size]
        tent = tape.op("Relu", tape.op("Sub", tape.scalar(1.0, x), tape.op("Abs", apart)))
        rising = tape.op("Mul", tape.op("Sign", tent), tape.op("Mul", tape.op("Sign", apart), slope))
        tents.append((tent, rising))
    (by_row, row_slope), (by_column, column_slope) = tents
    gathered = tape.op("Reshape", g, tape.ints(-1, channels, rows * columns, 1))
    gradients: list[ir.Value | None] = [None, None]

    def image(value: ir.Value) -> ir.Value:
        return tape.op("Unsqueeze", value, tape.ints(1))

    if x in tape.active:  # sum over p of g[c, p] row[p, i] column[p, j]
        weighted = tape.op("Mul", gathered, image(by_row))  # [N, C, P, H]
        turned = tape.op("Transpose", weighted, perm=[0, 1, 3, 2])
        gradients[0] = tape.op("MatMul", turned, image(by_column))
    if grid in tape.active:
        parts = []
        for left, right in ((by_row, column_slope), (row_slope, by_column)):
            seen = tape.op("MatMul", image(left), x)  # [N, C, P, W]
            value = tape.op("ReduceSum", tape.op("Mul", seen, image(right)), tape.ints(3), keepdims=1)
            parts.append(tape.op("ReduceSum", tape.op("Mul", value, gathered), tape.ints(1), keepdims=0))
        gradients[1] = tape.reshape_like(tape.op("Concat", *parts, axis=2), grid)
    return gradients
