"""Gradient rules of matrix products, determinants and convolutions.

With g the gradient of the output and ' the transpose of the last two axes:

- MatMul, y = A B: dA = g B', dB = A' g, summed over the axes that were broadcast
- Gemm, y = alpha A B + beta C, with optional transposes: dA = alpha g B', dB = alpha A' g, dC = beta g
- Det: dx = g C, with the cofactors C: determinants of the minors, with alternating signs
- Conv: dx = a Conv of g with the flipped kernel, or a ConvTranspose of g with the same weights
- ConvTranspose: dx = a Conv of g with the same weights
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from admtrt.errors import ExportError
from admtrt.export.nodes import dims_of, float_attribute, input_of, int_attribute, ints_attribute
from admtrt.export.vjp.rule import only, refuse_active, rule

if TYPE_CHECKING:
    from admtrt.export.tape import Tape
    from admtrt.export.vjp.rule import Gradients

_LARGEST_DET = 16
"""Rows of a matrix: its cofactors are as many determinants as it has elements."""


@rule("MatMul")
def _matmul(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g, a, b, out = only(incoming), input_of(node, 0), input_of(node, 1), node.outputs[0]
    if min(len(dims_of(a)), len(dims_of(b))) < 2:
        raise ExportError(f"MatMul '{node.name}' multiplies by a vector; use matrices")
    gradients: list[ir.Value | None] = [None, None]
    if a in tape.active:
        gradients[0] = _sum_batch(tape, tape.op("MatMul", g, tape.swap_last(b)), a, out)
    if b in tape.active:
        gradients[1] = _sum_batch(tape, tape.op("MatMul", tape.swap_last(a), g), b, out)
    return gradients


def _sum_batch(tape: Tape, gradient: ir.Value, like: ir.Value, out: ir.Value) -> ir.Value:
    """Undo the broadcasting of a product's leading axes. The last two never broadcast."""
    small, large = dims_of(like), dims_of(out)
    gradient.shape = ir.Shape([*(out.shape or ())[:-2], *small[-2:]])
    if small[:-2] == large[:-2]:
        return gradient
    return tape.sum_to(gradient, like, gradient)


@rule("Gemm")
def _gemm(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Y = alpha A' B' + beta C."""
    g, a, b = only(incoming), input_of(node, 0), input_of(node, 1)
    trans_a, trans_b = int_attribute(node, "transA", 0), int_attribute(node, "transB", 0)
    alpha = float_attribute(node, "alpha", 1.0)
    gradients: list[ir.Value | None] = [None] * len(node.inputs)
    if a in tape.active:
        left, right, flags = (b, g, (trans_b, 1)) if trans_a else (g, b, (0, 1 - trans_b))
        gradients[0] = tape.op("Gemm", left, right, alpha=alpha, transA=flags[0], transB=flags[1])
    if b in tape.active:
        left, right, flags = (g, a, (1, trans_a)) if trans_b else (a, g, (1 - trans_a, 0))
        gradients[1] = tape.op("Gemm", left, right, alpha=alpha, transA=flags[0], transB=flags[1])
    if len(node.inputs) > 2 and node.inputs[2] in tape.active:
        beta = float_attribute(node, "beta", 1.0)
        scaled = g if beta == 1.0 else tape.op("Mul", g, tape.scalar(beta, g))
        gradients[2] = tape.sum_to(scaled, input_of(node, 2), node.outputs[0])
    return gradients


@rule("Det")
def _det(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Cofactors, unlike det(x) times the inverse, are right for singular matrices too."""
    x, g = input_of(node, 0), only(incoming)
    dims = dims_of(x)
    size = dims[-1]
    if size is None or size > _LARGEST_DET:
        raise ExportError(
            f"Det '{node.name}' has matrices of {size or 'unknown'} rows; at most {_LARGEST_DET} have a rule",
            hint="Compute the determinant outside of the module, or of smaller blocks.",
        )
    rank = len(dims)
    outer = tape.op("Unsqueeze", g, tape.ints(rank - 2, rank - 1))
    if size == 1:
        return [outer]
    places = np.arange(size)
    others = np.array([np.delete(places, place) for place in places])
    minors = others[:, None, :, None] * size + others[None, :, None, :]  # places of x's elements, row by row
    flat = tape.op("Reshape", x, tape.ints(*(size or 0 for size in dims[:-2]), -1))
    cofactors = tape.op("Det", tape.op("Gather", flat, tape.array(minors), axis=rank - 2))
    assert x.dtype is not None
    signs = tape.array(((-1.0) ** (places[:, None] + places)).astype(x.dtype.numpy()))
    return [tape.op("Mul", outer, tape.op("Mul", cofactors, signs))]


@rule("Conv")
def _conv(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """The input's gradient; weights and bias must not depend on x.

    Stride 1: a Conv with the flipped kernel. Other strides, groups, and weights that are shared or computed:
    a ConvTranspose, which takes the weights in the layout they have.
    """
    g, x = only(incoming), input_of(node, 0)
    refuse_active(tape, node, 1, 2)
    weights = input_of(node, 1).const_value
    kernel = [size or 0 for size in dims_of(input_of(node, 1))[2:]]
    if not all(kernel):
        raise ExportError(f"Conv '{node.name}' has a kernel of unknown size")
    rank = len(kernel)
    _require_pads(node)
    strides, dilations = (
        ints_attribute(node, "strides", [1] * rank),
        ints_attribute(node, "dilations", [1] * rank),
    )
    pads, group = ints_attribute(node, "pads", [0] * (2 * rank)), int_attribute(node, "group", 1)
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    others: list[ir.Value | None] = [None] * (len(node.inputs) - 1)
    flipped_pads = [r - p for r, p in zip(reach * 2, pads, strict=True)]
    plain = set(strides) == {1} and group == 1 and min(flipped_pads) >= 0
    if plain and weights is not None and tape.conv_backward == "flipped":
        flipped = tape.array(_flipped(weights.numpy()))
        return [
            tape.op(
                "Conv",
                g,
                flipped,
                kernel_shape=kernel,
                dilations=dilations,
                pads=flipped_pads,
                strides=strides,
            ),
            *others,
        ]
    sizes, out_sizes = dims_of(x)[2:], dims_of(node.outputs[0])[2:]
    output_padding = []
    for axis in range(rank):
        size, out_size = sizes[axis], out_sizes[axis]
        if size is None or out_size is None:
            if strides[axis] != 1:
                raise ExportError(
                    f"Conv '{node.name}' has stride {strides[axis]} over an axis of unknown size"
                )
            output_padding.append(0)
            continue
        covered = (out_size - 1) * strides[axis] + reach[axis] + 1 - pads[axis] - pads[axis + rank]
        output_padding.append(size - covered)
    transposed = tape.op(
        "ConvTranspose",
        g,
        node.inputs[1],
        kernel_shape=kernel,
        strides=strides,
        dilations=dilations,
        pads=pads,
        group=group,
        output_padding=output_padding,
    )
    return [transposed, *others]


@rule("ConvTranspose")
def _conv_transpose(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """A Conv with the same weights, strides and pads, without the output padding."""
    refuse_active(tape, node, 1, 2)
    _require_pads(node)
    if "output_shape" in node.attributes:
        raise ExportError(f"ConvTranspose '{node.name}' uses output_shape; export explicit pads")
    rank = len(dims_of(input_of(node, 0))) - 2
    back = tape.op(
        "Conv",
        only(incoming),
        node.inputs[1],
        strides=ints_attribute(node, "strides", [1] * rank),
        dilations=ints_attribute(node, "dilations", [1] * rank),
        pads=ints_attribute(node, "pads", [0] * (2 * rank)),
        group=int_attribute(node, "group", 1),
    )
    return [back, *([None] * (len(node.inputs) - 1))]


def _require_pads(node: ir.Node) -> None:
    if "auto_pad" in node.attributes and node.attributes["auto_pad"].as_string() not in ("NOTSET", ""):
        raise ExportError(f"{node.op_type} '{node.name}' uses auto_pad; export explicit pads")


def _flipped(
    weights: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """[O, I, *k] -> [I, O, *k] with every kernel axis reversed."""
    spatial = tuple(range(2, weights.ndim))
    return np.ascontiguousarray(np.flip(weights, spatial).swapaxes(0, 1))
