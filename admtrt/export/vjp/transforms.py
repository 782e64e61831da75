"""Gradient rules of transforms: Fourier, overlapping patches.

With g the gradient of the output and dx the gradient of the input:

- DFT of N values: dx = N times the inverse transform of g. Inverse DFT: dx = the transform of g / N
- Col2Im: dx = the patches of g
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
