"""Vector-Jacobian products of ONNX operators, one small function each.

A rule gets the tape, the forward node and the gradients of its outputs (None where nothing flows), and
returns the gradients of its inputs (None where there is none, or where the input is constant in x). It may
use the forward node's inputs and outputs; what it does not use is dropped from the graph afterwards.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx_ir as ir

from admtrt.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from admtrt.export.differentiate import Tape

    Gradients = Sequence[ir.Value | None]


class Rule(Protocol):
    """See the module."""

    def __call__(self, tape: Tape, node: ir.Node, incoming: Gradients, /) -> Gradients:
        """Gradients of the node's inputs."""
        ...


RULES: dict[str, Rule] = {}


def _rule(*op_types: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for op_type in op_types:
            RULES[op_type] = rule
        return rule

    return register


# --- reading nodes -------------------------------------------------------------------------------------


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _dims(value: ir.Value) -> list[int | None]:
    """Sizes, None where dynamic."""
    if value.shape is None:
        raise ExportError(f"the shape of '{value.name}' is unknown; the graph cannot be differentiated")
    return [dim if isinstance(dim, int) else None for dim in value.shape]


def _constant(node: ir.Node, index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]] | None:
    """An input's constant value; None where the input is absent."""
    if index >= len(node.inputs) or node.inputs[index] is None:
        return None
    tensor = _input(node, index).const_value
    if tensor is None:
        raise ExportError(f"{node.op_type} '{node.name}' computes its input {index}; a constant was expected")
    return tensor.numpy()


def _ints(node: ir.Node, index: int) -> list[int] | None:
    values = _constant(node, index)
    return None if values is None else [int(value) for value in values.ravel()]


def _refuse_active(tape: Tape, node: ir.Node, *indices: int) -> None:
    """Inputs that a rule takes as constant must not depend on x: their gradient would be lost silently."""
    for index in indices:
        if index < len(node.inputs) and node.inputs[index] in tape.active:
            raise ExportError(
                f"no gradient rule for {node.op_type} '{node.name}' with respect to its input {index}, "
                f"'{_input(node, index).name}', which must not depend on the differentiated input"
            )


def _attribute(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _int_list(node: ir.Node, name: str, default: Sequence[int]) -> list[int]:
    return list(node.attributes[name].as_ints()) if name in node.attributes else list(default)


def _axes(node: ir.Node) -> list[int]:
    """Normalised axes of a reduction, from its second input (opset 18) or attribute."""
    rank = len(_dims(_input(node, 0)))
    axes = _ints(node, 1) or _int_list(node, "axes", range(rank))
    return [axis % rank for axis in axes]


def _only(incoming: Gradients) -> ir.Value:
    """The gradient of a node's first output, the only one that its rule knows."""
    first, *others = incoming
    if first is None or any(other is not None for other in others):
        raise ExportError("a gradient arrives through an output that its operator's rule does not cover")
    return first


# --- elementwise ---------------------------------------------------------------------------------------


@_rule("Identity")
def _identity(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    return [_only(incoming)]


@_rule("Neg")
def _neg(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    return [tape.op("Neg", _only(incoming))]


@_rule("Cast")
def _cast(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    dtype = _input(node, 0).dtype
    assert dtype is not None
    return [tape.cast(_only(incoming), dtype)]


@_rule("Add")
def _add(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g = _only(incoming)
    return [tape.sum_to(g, _input(node, i), node.outputs[0]) for i in range(2)]


@_rule("Sub")
def _sub(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g, out = _only(incoming), node.outputs[0]
    second = tape.op("Neg", g) if _input(node, 1) in tape.active else g
    return [tape.sum_to(g, _input(node, 0), out), tape.sum_to(second, _input(node, 1), out)]


@_rule("Mul")
def _mul(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g, out = _only(incoming), node.outputs[0]
    for own, other in ((0, 1), (1, 0)):
        sigmoid = _input(node, other).producer()
        if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.inputs[0] is _input(node, own):
            gradients: list[ir.Value | None] = [None, None]
            gradients[own] = _silu(tape, g, silu=out, sigmoid=_input(node, other))
            return gradients
    a, b = _input(node, 0), _input(node, 1)
    return [
        tape.sum_to(tape.op("Mul", g, b), a, out) if a in tape.active else None,
        tape.sum_to(tape.op("Mul", g, a), b, out) if b in tape.active else None,
    ]


def _silu(tape: Tape, g: ir.Value, *, silu: ir.Value, sigmoid: ir.Value) -> ir.Value:
    """d/dx [x s(x)] = s + x s (1 - s) = s + y (1 - s), from the sigmoid and the output that exist."""
    rest = tape.op("Sub", tape.scalar(1.0, silu), sigmoid)
    return tape.op("Mul", g, tape.op("Add", sigmoid, tape.op("Mul", silu, rest)))


@_rule("Div")
def _div(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g, (a, b), out = _only(incoming), (_input(node, 0), _input(node, 1)), node.outputs[0]
    scaled = tape.op("Div", g, b)
    second = tape.op("Neg", tape.op("Mul", scaled, out)) if b in tape.active else scaled
    return [tape.sum_to(scaled, a, out), tape.sum_to(second, b, out)]


@_rule("Pow")
def _pow(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    x, exponent = _input(node, 0), _constant(node, 1)
    if exponent is None or exponent.size != 1:
        raise ExportError(f"Pow '{node.name}' has no constant scalar exponent")
    p = float(exponent.item())
    power = x if p == 2 else tape.op("Pow", x, tape.scalar(p - 1, x))
    return [tape.op("Mul", _only(incoming), tape.op("Mul", power, tape.scalar(p, x))), None]


@_rule("Clip")
def _clip(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """The gradient passes where the value lies within the bounds, ends included, as in PyTorch."""
    x, g = _input(node, 0), _only(incoming)
    _refuse_active(tape, node, 1, 2)
    for index, outside in ((1, "Less"), (2, "Greater")):
        if index < len(node.inputs) and node.inputs[index] is not None:
            g = tape.op("Where", tape.op(outside, x, node.inputs[index]), tape.scalar(0.0, x), g)
    return [g, *([None] * (len(node.inputs) - 1))]


@_rule("Where")
def _where(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g, condition, out = _only(incoming), _input(node, 0), node.outputs[0]
    zero = tape.scalar(0.0, out)
    return [
        None,
        tape.sum_to(tape.op("Where", condition, g, zero), _input(node, 1), out),
        tape.sum_to(tape.op("Where", condition, zero, g), _input(node, 2), out),
    ]


def _unary(op_type: str, derivative: Callable[[Tape, ir.Value, ir.Value], ir.Value]) -> None:
    """Register y = f(x) by its derivative as a function of x and y."""

    def rule(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
        return [tape.op("Mul", _only(incoming), derivative(tape, _input(node, 0), node.outputs[0]))]

    RULES[op_type] = rule


def _one_minus(tape: Tape, y: ir.Value) -> ir.Value:
    return tape.op("Sub", tape.scalar(1.0, y), y)


_unary("Exp", lambda tape, x, y: y)
_unary("Log", lambda tape, x, y: tape.op("Reciprocal", x))
_unary("Sqrt", lambda tape, x, y: tape.op("Div", tape.scalar(0.5, y), y))
_unary("Reciprocal", lambda tape, x, y: tape.op("Neg", tape.op("Mul", y, y)))
_unary("Abs", lambda tape, x, y: tape.op("Sign", x))
_unary("Sin", lambda tape, x, y: tape.op("Cos", x))
_unary("Cos", lambda tape, x, y: tape.op("Neg", tape.op("Sin", x)))
_unary("Sigmoid", lambda tape, x, y: tape.op("Mul", y, _one_minus(tape, y)))
_unary("Tanh", lambda tape, x, y: _one_minus(tape, tape.op("Mul", y, y)))
_unary("Softplus", lambda tape, x, y: tape.op("Sigmoid", x))
_unary("Relu", lambda tape, x, y: tape.op("Sign", y))
_unary(
    "Erf",
    lambda tape, x, y: tape.op(
        "Mul", tape.scalar(2 / math.sqrt(math.pi), x), tape.op("Exp", tape.op("Neg", tape.op("Mul", x, x)))
    ),
)


@_rule("Gelu")
def _gelu(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    x = _input(node, 0)
    if "approximate" in node.attributes and node.attributes["approximate"].as_string() != "none":
        raise ExportError("no gradient rule for Gelu's tanh approximation", hint="Use the exact form.")
    scaled = tape.op("Mul", x, tape.scalar(math.sqrt(0.5), x))
    cdf = tape.op("Mul", tape.op("Add", tape.op("Erf", scaled), tape.scalar(1.0, x)), tape.scalar(0.5, x))
    density = tape.op("Exp", tape.op("Neg", tape.op("Mul", scaled, scaled)))
    slope = tape.op("Mul", tape.op("Mul", x, density), tape.scalar(1 / math.sqrt(2 * math.pi), x))
    return [tape.op("Mul", _only(incoming), tape.op("Add", cdf, slope))]


@_rule("LeakyRelu")
def _leaky_relu(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g, x = _only(incoming), _input(node, 0)
    alpha = node.attributes["alpha"].as_float() if "alpha" in node.attributes else 0.01
    negative = tape.op("Mul", g, tape.scalar(alpha, x))
    return [tape.op("Where", tape.op("Greater", x, tape.scalar(0.0, x)), g, negative)]


# --- products ------------------------------------------------------------------------------------------


@_rule("MatMul")
def _matmul(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g, a, b, out = _only(incoming), _input(node, 0), _input(node, 1), node.outputs[0]
    if min(len(_dims(a)), len(_dims(b))) < 2:
        raise ExportError(f"MatMul '{node.name}' multiplies by a vector; use matrices")
    gradients: list[ir.Value | None] = [None, None]
    if a in tape.active:
        gradients[0] = _sum_batch(tape, tape.op("MatMul", g, tape.swap_last(b)), a, out)
    if b in tape.active:
        gradients[1] = _sum_batch(tape, tape.op("MatMul", tape.swap_last(a), g), b, out)
    return gradients


def _sum_batch(tape: Tape, gradient: ir.Value, like: ir.Value, out: ir.Value) -> ir.Value:
    """Undo the broadcasting of a product's leading axes; the last two never broadcast."""
    small, large = _dims(like), _dims(out)
    gradient.shape = ir.Shape([*(out.shape or ())[:-2], *small[-2:]])
    if small[:-2] == large[:-2]:
        return gradient
    return tape.sum_to(gradient, like, gradient)


@_rule("Gemm")
def _gemm(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Y = alpha A' B' + beta C."""
    g, a, b = _only(incoming), _input(node, 0), _input(node, 1)
    trans_a, trans_b = _attribute(node, "transA", 0), _attribute(node, "transB", 0)
    alpha = node.attributes["alpha"].as_float() if "alpha" in node.attributes else 1.0
    gradients: list[ir.Value | None] = [None] * len(node.inputs)
    if a in tape.active:
        left, right, flags = (b, g, (trans_b, 1)) if trans_a else (g, b, (0, 1 - trans_b))
        gradients[0] = tape.op("Gemm", left, right, alpha=alpha, transA=flags[0], transB=flags[1])
    if b in tape.active:
        left, right, flags = (g, a, (1, trans_a)) if trans_b else (a, g, (1 - trans_a, 0))
        gradients[1] = tape.op("Gemm", left, right, alpha=alpha, transA=flags[0], transB=flags[1])
    if len(node.inputs) > 2 and node.inputs[2] in tape.active:
        beta = node.attributes["beta"].as_float() if "beta" in node.attributes else 1.0
        scaled = g if beta == 1.0 else tape.op("Mul", g, tape.scalar(beta, g))
        gradients[2] = tape.sum_to(scaled, _input(node, 2), node.outputs[0])
    return gradients


@_rule("Conv")
def _conv(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """The input's gradient; weights and bias must be constants.

    Stride 1: the correlation with the flipped kernel, as a Conv. Other strides, groups, or where weights
    are to be shared: a ConvTranspose, whose layout of the weights is the one they have.
    """
    g, x = _only(incoming), _input(node, 0)
    _refuse_active(tape, node, 2)
    weights = _constant(node, 1)
    assert weights is not None
    kernel = list(weights.shape[2:])
    rank = len(kernel)
    if "auto_pad" in node.attributes and node.attributes["auto_pad"].as_string() not in ("NOTSET", ""):
        raise ExportError(f"Conv '{node.name}' uses auto_pad; export explicit pads")
    strides, dilations = _int_list(node, "strides", [1] * rank), _int_list(node, "dilations", [1] * rank)
    pads, group = _int_list(node, "pads", [0] * (2 * rank)), _attribute(node, "group", 1)
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    others: list[ir.Value | None] = [None] * (len(node.inputs) - 1)
    flipped_pads = [r - p for r, p in zip(reach * 2, pads, strict=True)]
    if set(strides) == {1} and group == 1 and tape.conv_backward == "flipped" and min(flipped_pads) >= 0:
        flipped = tape.array(_flipped(weights))
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
    sizes, out_sizes = _dims(x)[2:], _dims(node.outputs[0])[2:]
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


def _flipped(
    weights: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """[O, I, *k] -> [I, O, *k] with every kernel axis reversed."""
    spatial = tuple(range(2, weights.ndim))
    return np.ascontiguousarray(np.flip(weights, spatial).swapaxes(0, 1))


# --- normalisation and softmax -------------------------------------------------------------------------


def _normalisation(
    tape: Tape, x: ir.Value, g: ir.Value, axes: list[int], epsilon: float, normalised: ir.Value | None = None
) -> ir.Value:
    """Gradient through y = (x - mean) / std over ``axes``: (g - mean(g) - y mean(g y)) / std.

    In float32 whatever the graph's type, since the sums run over up to millions of elements; the variance
    in two passes, never as E[x^2] - E[x]^2. ``normalised`` is y where the forward graph holds it.
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
    return node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5


@_rule("InstanceNormalization")
def _instance_norm(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Every channel normalised over its positions; in the group-norm form each channel is a whole group."""
    g, x, scale, bias = _only(incoming), _input(node, 0), _constant(node, 1), _constant(node, 2)
    assert scale is not None
    rank = len(_dims(x))
    normalised = node.outputs[0] if np.all(scale == 1) and not np.any(bias) else None
    if normalised is None:
        g = tape.op("Mul", g, tape.array(scale.reshape(-1, *[1] * (rank - 2))))
    return [_normalisation(tape, x, g, list(range(2, rank)), _epsilon(node), normalised), None, None]


@_rule("LayerNormalization")
def _layer_norm(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g, x = _only(incoming), _input(node, 0)
    _refuse_active(tape, node, 1, 2)
    rank = len(_dims(x))
    axis = _attribute(node, "axis", -1) % rank
    g = tape.op("Mul", g, _input(node, 1))
    result = _normalisation(tape, x, g, list(range(axis, rank)), _epsilon(node))
    return [result, *([None] * (len(node.inputs) - 1))]


@_rule("GroupNormalization")
def _group_norm(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Opset 21: one scale and bias for each channel."""
    g, x = _only(incoming), _input(node, 0)
    dims = _dims(x)
    groups = node.attributes["num_groups"].as_int()
    _refuse_active(tape, node, 2)
    scale = _constant(node, 1)
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


@_rule("BatchNormalization")
def _batch_norm(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Inference form: a constant scale for each channel."""
    _refuse_active(tape, node, 2, 3)
    scale, variance = _constant(node, 1), _constant(node, 4)
    assert scale is not None
    assert variance is not None
    factor = scale / np.sqrt(variance + np.asarray(_epsilon(node), variance.dtype))
    factor = factor.astype(scale.dtype).reshape(-1, *[1] * (len(_dims(_input(node, 0))) - 2))
    return [tape.op("Mul", _only(incoming), tape.array(factor)), *([None] * 4)]


@_rule("Softmax")
def _softmax(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """y (g - sum(g y))."""
    g, y = _only(incoming), node.outputs[0]
    total = tape.op("ReduceSum", tape.op("Mul", g, y), tape.ints(_attribute(node, "axis", -1)), keepdims=1)
    return [tape.op("Mul", y, tape.op("Sub", g, total))]


@_rule("LogSoftmax")
def _log_softmax(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """g - softmax sum(g)."""
    g, y = _only(incoming), node.outputs[0]
    total = tape.op("ReduceSum", g, tape.ints(_attribute(node, "axis", -1)), keepdims=1)
    return [tape.op("Sub", g, tape.op("Mul", tape.op("Exp", y), total))]


# --- reductions and pooling ----------------------------------------------------------------------------


def _spread(tape: Tape, node: ir.Node, gradient: ir.Value) -> ir.Value:
    """A reduction's gradient with the reduced axes back, at size 1."""
    if _attribute(node, "keepdims", 1):
        return gradient
    return tape.op("Unsqueeze", gradient, tape.ints(*_axes(node)))


def _expand(tape: Tape, value: ir.Value, like: ir.Value, axes: Sequence[int]) -> ir.Value:
    dims = _dims(like)
    if any(dims[axis] is None for axis in axes):
        return tape.op("Expand", value, tape.op("Shape", like))
    # Size 1 leaves an axis as it is, so the batch needs no mention.
    return tape.op(
        "Expand", value, tape.ints(*[size if axis in axes and size else 1 for axis, size in enumerate(dims)])
    )


@_rule("ReduceSum", "ReduceMean")
def _reduce(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    x, axes = _input(node, 0), _axes(node)
    g = _spread(tape, node, _only(incoming))
    if node.op_type == "ReduceMean":
        sizes = [_dims(x)[axis] for axis in axes]
        if any(size is None for size in sizes):
            raise ExportError(f"ReduceMean '{node.name}' averages over an axis of unknown size")
        g = tape.op("Mul", g, tape.scalar(1 / math.prod(size for size in sizes if size), x))
    return [_expand(tape, g, x, axes), *([None] * (len(node.inputs) - 1))]


@_rule("ReduceSumSquare", "ReduceL2")
def _reduce_squares(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    x = _input(node, 0)
    g = _spread(tape, node, _only(incoming))
    if node.op_type == "ReduceL2":
        norm = _spread(tape, node, node.outputs[0])
        zero = tape.scalar(0.0, x)  # the subgradient at 0 that PyTorch takes
        g = tape.op("Where", tape.op("Greater", norm, zero), tape.op("Div", g, norm), zero)
    else:
        g = tape.op("Mul", g, tape.scalar(2.0, x))
    return [tape.op("Mul", g, x), *([None] * (len(node.inputs) - 1))]


@_rule("ReduceLogSumExp")
def _reduce_log_sum_exp(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    x = _input(node, 0)
    weights = tape.op("Exp", tape.op("Sub", x, _spread(tape, node, node.outputs[0])))
    g = _spread(tape, node, _only(incoming))
    return [tape.op("Mul", weights, g), *([None] * (len(node.inputs) - 1))]


@_rule("GlobalAveragePool")
def _global_average_pool(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    x = _input(node, 0)
    dims = _dims(x)
    spatial = list(range(2, len(dims)))
    count = math.prod(dims[axis] or 0 for axis in spatial)
    if not count:
        raise ExportError(f"GlobalAveragePool '{node.name}' averages over an axis of unknown size")
    return [_expand(tape, tape.op("Mul", _only(incoming), tape.scalar(1 / count, x)), x, spatial)]


@_rule("AveragePool")
def _average_pool(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Windows that tile the image exactly: every position gets its window's share, a nearest resize."""
    kernel = _int_list(node, "kernel_shape", ())
    strides = _int_list(node, "strides", [1] * len(kernel))
    sizes = _dims(_input(node, 0))[2:]
    tiled = (
        strides == kernel and not any(_int_list(node, "pads", [0])) and not _attribute(node, "ceil_mode", 0)
    )
    if not tiled or any(size is None or size % k for size, k in zip(sizes, kernel, strict=True)):
        raise ExportError(f"AveragePool '{node.name}' has windows that overlap, pad or do not tile the image")
    g = _only(incoming)
    share = tape.op("Mul", g, tape.scalar(1 / math.prod(kernel), _input(node, 0)))
    return [_nearest(tape, share, kernel)]


_TILING: dict[str, Any] = {
    "mode": "nearest",
    "coordinate_transformation_mode": "asymmetric",
    "nearest_mode": "floor",
}
"""The one form of Resize in which position i is a copy of position floor(i / factor), for every factor."""


def _nearest(tape: Tape, value: ir.Value, factors: Sequence[int]) -> ir.Value:
    scales = tape.array(np.array([1, 1, *factors], np.float32))
    return tape.op("Resize", value, None, scales, **_TILING)


@_rule("Resize")
def _resize(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Nearest-neighbour enlargement by whole factors: sums over tiles."""
    x, out = _input(node, 0), node.outputs[0]
    text = {name: attribute.as_string() for name, attribute in node.attributes.items() if name in _TILING}
    pairs = list(zip(_dims(x)[2:], _dims(out)[2:], strict=True))
    if text != _TILING or any(a is None or b is None or b % a for a, b in pairs):
        raise ExportError(f"Resize '{node.name}' is no nearest-neighbour enlargement by whole factors")
    factors = [b // a for a, b in pairs if a and b]
    pooled = tape.op("AveragePool", _only(incoming), kernel_shape=factors, strides=factors)
    return [tape.op("Mul", pooled, tape.scalar(math.prod(factors), x)), *([None] * (len(node.inputs) - 1))]


# --- layout --------------------------------------------------------------------------------------------


@_rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    back = tape.reshape_like(_only(incoming), _input(node, 0))
    return [back, *([None] * (len(node.inputs) - 1))]


@_rule("Transpose")
def _transpose(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    rank = len(_dims(_input(node, 0)))
    perm = _int_list(node, "perm", range(rank - 1, -1, -1))
    return [tape.op("Transpose", _only(incoming), perm=[perm.index(axis) for axis in range(rank)])]


@_rule("Expand")
def _expand_rule(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    return [tape.sum_to(_only(incoming), _input(node, 0), node.outputs[0]), None]


@_rule("Concat")
def _concat(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    axis = _attribute(node, "axis", 0)
    sizes = [_dims(_input(node, index))[axis] for index in range(len(node.inputs))]
    if any(size is None for size in sizes):
        raise ExportError(f"Concat '{node.name}' joins along an axis of unknown size")
    split = tape.op(
        "Split", _only(incoming), tape.ints(*[s for s in sizes if s]), outputs=len(sizes), axis=axis
    )
    producer = split.producer()
    assert producer is not None
    return list(producer.outputs)


@_rule("Split")
def _split(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    parts = [
        g if g is not None else tape.op("Expand", tape.scalar(0.0, output), tape.op("Shape", output))
        for g, output in zip(incoming, node.outputs, strict=True)
    ]
    joined = tape.op("Concat", *parts, axis=_attribute(node, "axis", 0))
    return [joined, *([None] * (len(node.inputs) - 1))]


@_rule("Slice")
def _slice(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Zero padding puts a contiguous slice back; no scatter."""
    x = _input(node, 0)
    dims, rank = _dims(x), len(_dims(x))
    starts, ends = _ints(node, 1) or [], _ints(node, 2) or []
    axes = _ints(node, 3) or list(range(len(starts)))
    steps = _ints(node, 4) or [1] * len(starts)
    before, after = [0] * rank, [0] * rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = dims[axis]
        if step != 1 or size is None:
            raise ExportError(f"Slice '{node.name}' has a stride or cuts an axis of unknown size")
        first, stop, _ = slice(start, end).indices(size)
        before[axis], after[axis] = first, size - max(stop, first)
    return [_pad(tape, _only(incoming), before, after), *([None] * (len(node.inputs) - 1))]


@_rule("Gather")
def _gather(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Selection of one constant index: zero padding around it."""
    x, indices = _input(node, 0), _constant(node, 1)
    dims = _dims(x)
    axis = _attribute(node, "axis", 0) % len(dims)
    size = dims[axis]
    if indices is None or indices.size != 1 or size is None:
        raise ExportError(f"Gather '{node.name}' selects more than one constant index; use slices")
    index = int(indices.item()) % size
    g = _only(incoming)
    if indices.ndim == 0:
        g = tape.op("Unsqueeze", g, tape.ints(axis))
    before, after = [0] * len(dims), [0] * len(dims)
    before[axis], after[axis] = index, size - 1 - index
    return [_pad(tape, g, before, after), None]


def _pad(tape: Tape, value: ir.Value, before: Sequence[int], after: Sequence[int]) -> ir.Value:
    if not any(before) and not any(after):
        return value
    return tape.op("Pad", value, tape.ints(*before, *after))


@_rule("Pad")
def _pad_rule(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    pads, rank = _ints(node, 1), len(_dims(_input(node, 0)))
    constant = "mode" not in node.attributes or node.attributes["mode"].as_string() == "constant"
    if pads is None or len(pads) != 2 * rank or min(pads) < 0 or not constant:
        raise ExportError(f"Pad '{node.name}' is no plain constant padding")
    cut = [axis for axis in range(rank) if pads[axis] or pads[axis + rank]]
    ends = [-pads[axis + rank] if pads[axis + rank] else np.iinfo(np.int64).max for axis in cut]
    starts = tape.ints(*[pads[axis] for axis in cut])
    back = tape.op("Slice", _only(incoming), starts, tape.ints(*ends), tape.ints(*cut))
    return [back, *([None] * (len(node.inputs) - 1))]
