"""Gradient rules of normalisations and softmax.

With y the output, g its gradient, n the normalised x, r = 1 / sqrt(variance + epsilon), h = g scale, and
means over the elements that are normalised together:

- InstanceNormalization, LayerNormalization, GroupNormalization: dx = r (h - mean(h) - n mean(h n))
- BatchNormalization, inference form: dx = h r
- Softmax: dx = y (g - sum(g y))
- LogSoftmax: dx = g - p sum(g), p = exp(y)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from admtrt.errors import ExportError
from admtrt.export.nodes import dims_of, float_attribute, input_of, int_attribute, swaps_last
from admtrt.export.vjp.rule import constant_of, only, refuse_active, rule

if TYPE_CHECKING:
    from admtrt.export.tape import Tape
    from admtrt.export.vjp.rule import Gradients


def _normalisation(
    tape: Tape, x: ir.Value, g: ir.Value, axes: list[int], epsilon: float, normalised: ir.Value | None = None
) -> ir.Value:
    """Gradient through y = (x - mean) / std over ``axes``: (g - mean(g) - y mean(g y)) / std.

    Always in float32, since the sums run over up to millions of elements. The variance is computed in two
    passes, never as E[x^2] - E[x]^2. ``normalised`` is y, if the forward graph contains it.
    """
    dtype = x.dtype
    assert dtype is not None
    narrow = dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    if narrow:
        x, g = (tape.cast(value, ir.DataType.FLOAT) for value in (x, g))
    centered = tape.op("Sub", x, tape.op("ReduceMean", x, tape.ints(*axes), keepdims=1))
    variance = tape.op("ReduceMean", tape.op("Mul", centered, centered), tape.ints(*axes), keepdims=1)
    std = tape.op("Sqrt", tape.op("Add", variance, tape.scalar(epsilon, x)))
    y = tape.op("Div", centered, std) if narrow or normalised is None else normalised
    mean_g = tape.op("ReduceMean", g, tape.ints(*axes), keepdims=1)
    mean_gy = tape.op("ReduceMean", tape.op("Mul", g, y), tape.ints(*axes), keepdims=1)
    inner = tape.op("Sub", tape.op("Sub", g, mean_g), tape.op("Mul", y, mean_gy))
    result = tape.op("Div", inner, std)
    return tape.cast(result, dtype) if narrow else result


def _epsilon(node: ir.Node) -> float:
    return float_attribute(node, "epsilon", 1e-5)


@rule("InstanceNormalization")
def _instance_norm(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Each channel is normalised over its positions. In the group-norm form a channel is a whole group."""
    g, x, scale, bias = only(incoming), input_of(node, 0), constant_of(node, 1), constant_of(node, 2)
    assert scale is not None
    rank = len(dims_of(x))
    normalised = node.outputs[0] if np.all(scale == 1) and not np.any(bias) else None
    if normalised is None:
        g = tape.op("Mul", g, tape.array(scale.reshape(-1, *[1] * (rank - 2))))
    return [_normalisation(tape, x, g, list(range(2, rank)), _epsilon(node), normalised), None, None]


@rule("LayerNormalization")
def _layer_norm(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g, x = only(incoming), input_of(node, 0)
    refuse_active(tape, node, 1, 2)
    rank = len(dims_of(x))
    axis = int_attribute(node, "axis", -1) % rank
    g = tape.op("Mul", g, input_of(node, 1))
    result = _normalisation(tape, x, g, list(range(axis, rank)), _epsilon(node))
    return [result, *([None] * (len(node.inputs) - 1))]


@rule("GroupNormalization")
def _group_norm(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Opset 21: one scale and one bias per channel."""
    g, x = only(incoming), input_of(node, 0)
    dims = dims_of(x)
    groups = node.attributes["num_groups"].as_int()
    refuse_active(tape, node, 2)
    scale = constant_of(node, 1)
    assert scale is not None
    if scale.shape[0] != dims[1]:
        raise ExportError(
            "GroupNormalization before opset 21 has no gradient rule", hint="Export with opset 21."
        )
    g = tape.op("Mul", g, tape.array(scale.reshape(-1, *[1] * (len(dims) - 2))))
    by_group = tape.ints(0, groups, -1)
    grouped, grouped_g = (tape.op("Reshape", value, by_group) for value in (x, g))
    result = _normalisation(tape, grouped, grouped_g, [2], _epsilon(node))
    return [tape.reshape_like(result, x), None, None]


@rule("BatchNormalization")
def _batch_norm(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Inference form: a constant scale per channel."""
    refuse_active(tape, node, 2, 3)
    scale, variance = constant_of(node, 1), constant_of(node, 4)
    assert scale is not None
    assert variance is not None
    factor = scale / np.sqrt(variance + np.asarray(_epsilon(node), variance.dtype))
    factor = factor.astype(scale.dtype).reshape(-1, *[1] * (len(dims_of(input_of(node, 0))) - 2))
    return [tape.op("Mul", only(incoming), tape.array(factor)), *([None] * 4)]


@rule("Softmax")
def _softmax(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """y (g - sum(g y))."""
    g, y = only(incoming), node.outputs[0]
    total = _sum_by_product(tape, node)
    if total is None:
        axis = tape.ints(int_attribute(node, "axis", -1))
        total = tape.op("ReduceSum", tape.op("Mul", g, y), axis, keepdims=1)
    return [tape.op("Mul", y, tape.op("Sub", g, total))]


def _sum_by_product(tape: Tape, softmax: ir.Node) -> ir.Value | None:
    """Compute sum(g y) of attention weights y as sum(dO O), where O = y V or V' y' is attention's output.

    The two are equal, since g = dO V' (used by FlashAttention, Dao et al. 2022). The sum runs over the
    channels of a head instead of all positions, so the largest tensors of a network are read once, not three
    times. None if y has other readers, or O does not have fewer columns.
    """
    y = softmax.outputs[0]
    turned = tape.only_reader(y, "Transpose")
    weights = y if turned is None else turned.outputs[0]
    product = tape.only_reader(weights, "MatMul")
    if product is None or product.inputs[0 if turned is None else 1] is not weights:
        return None
    out = product.outputs[0]
    rank, axis = len(dims_of(y)), -1 if turned is None else -2
    columns, channels = dims_of(y)[-1], dims_of(out)[axis]
    if (
        int_attribute(softmax, "axis", -1) % rank != rank - 1
        or (turned is not None and not swaps_last(turned, rank))
        or dims_of(out)[:-2] != dims_of(y)[:-2]
        or columns is None
        or channels is None
        or channels >= columns
    ):
        return None
    total = tape.op("ReduceSum", tape.op("Mul", tape.gradients[out], out), tape.ints(axis), keepdims=1)
    if turned is None:
        return total
    total.shape = ir.Shape([1 if index == rank - 2 else dim for index, dim in enumerate(out.shape or ())])
    return tape.swap_last(total)


@rule("LogSoftmax")
def _log_softmax(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """g - p sum(g), p the softmax, as g (1 - p) - p (sum(g) - g).

    The gradient of one class's log p is 1 - p, which cancels if the network is certain. Therefore 1 - p of a
    p above one half is computed as the sum of the other probabilities. The result is then as accurate as p,
    relative to its size, in bf16 too.
    """
    g, axis = only(incoming), int_attribute(node, "axis", -1)
    p = tape.op("Softmax", input_of(node, 0), axis=axis)
    zero, one = tape.scalar(0.0, p), tape.scalar(1.0, p)

    def total(value: ir.Value) -> ir.Value:
        return tape.op("ReduceSum", value, tape.ints(axis), keepdims=1)

    likely = tape.op("Greater", p, tape.scalar(0.5, p))
    unlikely = total(tape.op("Where", likely, zero, p))
    rest = tape.op("Where", likely, unlikely, tape.op("Sub", one, p))
    others = tape.op("Mul", p, tape.op("Sub", total(g), g))
    return [tape.op("Sub", tape.op("Mul", g, rest), others)]
