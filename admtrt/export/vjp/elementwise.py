"""Gradient rules of elementwise operators.

With y the output, g its gradient and dx the gradient of the input; broadcast axes are summed over.

- Identity: dx = g. Neg: dx = -g. Cast: dx = g in the type of x
- Add, Sum: dx = g for each. Mean of n: dx = g / n. Sub: da = g, db = -g
- Mul: da = g b, db = g a; of x sigmoid(x) with s = sigmoid(x): dx = g (s + y (1 - s))
- Div: da = g / b, db = -g y / b
- Pow: dx = g p x^(p - 1), dp = g y log x
- Clip: dx = g within the bounds, 0 outside. Where: da = g where it is taken, else 0
- Max, Min: dx = g where it is taken, g / 2 for each of two equal values
- Exp: dx = g y. Log: dx = g / x. Reciprocal: dx = -g y^2. Sqrt: dx = g / (2 y), 0 at 0. Abs: dx = g sign x
- Sin: dx = g cos x. Cos: dx = -g sin x. Tan: dx = g (1 + y^2)
- Asin: dx = g / sqrt(1 - x^2). Acos: dx = -g / sqrt(1 - x^2). Atan: dx = g / (1 + x^2)
- Sinh: dx = g cosh x. Cosh: dx = g sinh x. Tanh: dx = g (1 - y^2)
- Asinh: dx = g / sqrt(x^2 + 1). Acosh: dx = g / sqrt(x^2 - 1). Atanh: dx = g / (1 - x^2)
- Sigmoid: dx = g y (1 - y). Softplus: dx = g exp(x - y). Softsign: dx = g (1 - |y|)^2
- Erf: dx = g 2 / sqrt(pi) exp(-x^2). Gelu: dx = g (cdf(x) + x density(x)), or the same of its form by tanh
- Mish: dx = g (h + x (1 - h^2) sigmoid(x)), h = tanh(softplus(x))
- Relu: dx = g where x > 0. ThresholdedRelu: dx = g where x > alpha
- LeakyRelu, PRelu: dx = g where x > 0, else slope g
- Elu, Selu, Celu: dx = g m where x > 0, else g (y + k) / s
- HardSigmoid: dx = alpha g where 0 < y < 1. HardSwish: dx = g (x / 3 + 1 / 2) where -3 < x < 3, g above
- Mod, y = x - k d with a whole number k: dx = g, dd = -g k. Floor, Ceil, Round, Sign: dx = 0
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx_ir as ir

from admtrt.errors import ExportError
from admtrt.export.kinks import finite_at_zero, is_clamp, passes_at_ends
from admtrt.export.nodes import float_attribute, input_of
from admtrt.export.vjp.rule import only, refuse_active, rule

if TYPE_CHECKING:
    from collections.abc import Callable

    from admtrt.export.tape import Tape
    from admtrt.export.vjp.rule import Gradients


@rule("Identity")
def _identity(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    return [only(incoming)]


@rule("Neg")
def _neg(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    return [tape.op("Neg", only(incoming))]


@rule("Cast")
def _cast(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    dtype = input_of(node, 0).dtype
    assert dtype is not None
    return [tape.cast(only(incoming), dtype)]


@rule("Sum", "Mean")
def _sum(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Sum any number of values."""
    g = only(incoming)
    if node.op_type == "Mean":
        g = tape.op("Mul", g, tape.scalar(1 / len(node.inputs), g))
    return [tape.sum_to(g, input_of(node, index), node.outputs[0]) for index in range(len(node.inputs))]


@rule("Add")
def _add(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g = only(incoming)
    return [tape.sum_to(g, input_of(node, i), node.outputs[0]) for i in range(2)]


@rule("Sub")
def _sub(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g, out = only(incoming), node.outputs[0]
    second = tape.op("Neg", g) if input_of(node, 1) in tape.active else g
    return [tape.sum_to(g, input_of(node, 0), out), tape.sum_to(second, input_of(node, 1), out)]


@rule("Mul")
def _mul(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g, out = only(incoming), node.outputs[0]
    for own, other in ((0, 1), (1, 0)):
        sigmoid = input_of(node, other).producer()
        if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.inputs[0] is input_of(node, own):
            gradients: list[ir.Value | None] = [None, None]
            gradients[own] = _silu(tape, g, silu=out, sigmoid=input_of(node, other))
            return gradients
    a, b = input_of(node, 0), input_of(node, 1)
    return [
        tape.sum_to(tape.op("Mul", g, b), a, out) if a in tape.active else None,
        tape.sum_to(tape.op("Mul", g, a), b, out) if b in tape.active else None,
    ]


def _silu(tape: Tape, g: ir.Value, *, silu: ir.Value, sigmoid: ir.Value) -> ir.Value:
    """d/dx [x s(x)] = s + x s (1 - s) = s + y (1 - s), from the sigmoid and the output that exist."""
    rest = tape.op("Sub", tape.scalar(1.0, silu), sigmoid)
    return tape.op("Mul", g, tape.op("Add", sigmoid, tape.op("Mul", silu, rest)))


@rule("Div")
def _div(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g, (a, b), out = only(incoming), (input_of(node, 0), input_of(node, 1)), node.outputs[0]
    scaled = tape.op("Div", g, b)
    second = tape.op("Neg", tape.op("Mul", scaled, out)) if b in tape.active else scaled
    return [tape.sum_to(scaled, a, out), tape.sum_to(second, b, out)]


@rule("Pow")
def _pow(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """d/dx x^p = p x^(p - 1), 0 for p = 0; d/dp x^p = x^p log x, 0 for x = 0: as in PyTorch."""
    g, x, p, y = only(incoming), input_of(node, 0), input_of(node, 1), node.outputs[0]
    gradients: list[ir.Value | None] = [None, None]
    if x in tape.active:
        slope = _slope_of_power(tape, node)
        gradients[0] = None if slope is None else tape.sum_to(tape.op("Mul", g, slope), x, y)
    if p in tape.active:
        zero = tape.scalar(0.0, x)
        slope = tape.op("Where", tape.op("Equal", x, zero), zero, tape.op("Mul", y, tape.op("Log", x)))
        gradients[1] = tape.sum_to(tape.op("Mul", g, slope), p, y)
    return gradients


def _slope_of_power(tape: Tape, node: ir.Node) -> ir.Value | None:
    """The derivative of x^p with respect to x; None if it is 0 everywhere."""
    x, p = input_of(node, 0), input_of(node, 1)
    assert x.dtype is not None
    zero = tape.scalar(0.0, x)
    if p.const_value is None:
        p = p if p.dtype == x.dtype else tape.cast(p, x.dtype)
        power = tape.op("Pow", x, tape.op("Sub", p, tape.scalar(1.0, x)))
        return tape.op("Where", tape.op("Equal", p, zero), zero, tape.op("Mul", power, p))
    exponents = p.const_value.numpy().astype(x.dtype.numpy())
    if not exponents.any():
        return None
    if exponents.size == 1:  # a scalar, whatever its rank
        exponents = exponents.reshape(())
    factor, less = tape.array(exponents), tape.array(exponents - exponents.dtype.type(1))
    power = x if (exponents == 2).all() else tape.op("Pow", x, less)
    slope = tape.op("Mul", power, factor)
    if (exponents == 0).any():
        return tape.op("Where", tape.array(exponents == 0), zero, slope)
    if finite_at_zero(node) and (exponents < 1).any():
        return tape.op("Where", tape.op("Equal", x, zero), zero, slope)
    return slope


@rule("Clip")
def _clip(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """The gradient passes inside the bounds; exactly at them it follows PyTorch's function."""
    x, g = input_of(node, 0), only(incoming)
    refuse_active(tape, node, 1, 2)
    outside_of = ("Less", "Greater") if passes_at_ends(node) else ("LessOrEqual", "GreaterOrEqual")
    for index, outside in enumerate(outside_of, start=1):
        if index < len(node.inputs) and node.inputs[index] is not None:
            g = tape.op("Where", tape.op(outside, x, node.inputs[index]), tape.scalar(0.0, x), g)
    return [g, *([None] * (len(node.inputs) - 1))]


@rule("Where")
def _where(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g, condition, out = only(incoming), input_of(node, 0), node.outputs[0]
    zero = tape.scalar(0.0, out)
    return [
        None,
        tape.sum_to(tape.op("Where", condition, g, zero), input_of(node, 1), out),
        tape.sum_to(tape.op("Where", condition, zero, g), input_of(node, 2), out),
    ]


def _unary(op_type: str, derivative: Callable[[Tape, ir.Value, ir.Value], ir.Value]) -> None:
    """Register the rule of y = f(x), given its derivative as a function of x and y."""

    def product(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
        return [tape.op("Mul", only(incoming), derivative(tape, input_of(node, 0), node.outputs[0]))]

    rule(op_type)(product)


def _square(tape: Tape, x: ir.Value) -> ir.Value:
    return tape.op("Mul", x, x)


def _square_plus(tape: Tape, x: ir.Value, term: float) -> ir.Value:
    return tape.op("Add", _square(tape, x), tape.scalar(term, x))


def _reciprocal_root(tape: Tape, x: ir.Value) -> ir.Value:
    return tape.op("Reciprocal", tape.op("Sqrt", x))


def _one_minus(tape: Tape, y: ir.Value) -> ir.Value:
    return tape.op("Sub", tape.scalar(1.0, y), y)


_unary("Exp", lambda tape, x, y: y)
_unary("Log", lambda tape, x, y: tape.op("Reciprocal", x))
_unary("Reciprocal", lambda tape, x, y: tape.op("Neg", tape.op("Mul", y, y)))
_unary("Abs", lambda tape, x, y: tape.op("Sign", x))
_unary("Sin", lambda tape, x, y: tape.op("Cos", x))
_unary("Cos", lambda tape, x, y: tape.op("Neg", tape.op("Sin", x)))
_unary("Tan", lambda tape, x, y: _square_plus(tape, y, 1.0))
_unary("Asin", lambda tape, x, y: _reciprocal_root(tape, _one_minus(tape, _square(tape, x))))
_unary("Acos", lambda tape, x, y: tape.op("Neg", _reciprocal_root(tape, _one_minus(tape, _square(tape, x)))))
_unary("Atan", lambda tape, x, y: tape.op("Reciprocal", _square_plus(tape, x, 1.0)))
_unary("Sinh", lambda tape, x, y: tape.op("Cosh", x))
_unary("Cosh", lambda tape, x, y: tape.op("Sinh", x))
_unary("Asinh", lambda tape, x, y: _reciprocal_root(tape, _square_plus(tape, x, 1.0)))
_unary("Acosh", lambda tape, x, y: _reciprocal_root(tape, _square_plus(tape, x, -1.0)))
_unary("Atanh", lambda tape, x, y: tape.op("Reciprocal", _one_minus(tape, _square(tape, x))))
_unary("Sigmoid", lambda tape, x, y: tape.op("Mul", y, _one_minus(tape, y)))
_unary("Softsign", lambda tape, x, y: _square(tape, _one_minus(tape, tape.op("Abs", y))))
_unary("Tanh", lambda tape, x, y: _one_minus(tape, tape.op("Mul", y, y)))
# exp(x - y) is the sigmoid, accurate also far below 0, where it is the whole gradient of log p.
_unary("Softplus", lambda tape, x, y: tape.op("Exp", tape.op("Sub", x, y)))
_unary(
    "Erf",
    lambda tape, x, y: tape.op(
        "Mul", tape.scalar(2 / math.sqrt(math.pi), x), tape.op("Exp", tape.op("Neg", tape.op("Mul", x, x)))
    ),
)


@rule("Relu")
def _relu(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Select by Where, as 0 * inf is NaN: PyTorch has 0 for an infinite gradient at 0, as of a root."""
    y, g = node.outputs[0], only(incoming)
    zero = tape.scalar(0.0, y)
    return [tape.op("Where", tape.op("Greater", y, zero), g, zero)]


@rule("Mod")
def _mod(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """The multiple is (x - y) / d, which is whole but for rounding."""
    x, divisor, y, g = input_of(node, 0), input_of(node, 1), node.outputs[0], only(incoming)
    gradients: list[ir.Value | None] = [tape.sum_to(g, x, y), None]
    if divisor in tape.active:
        multiple = tape.op("Round", tape.op("Div", tape.op("Sub", x, y), divisor))
        gradients[1] = tape.sum_to(tape.op("Neg", tape.op("Mul", g, multiple)), divisor, y)
    return gradients


@rule("Floor", "Ceil", "Round", "Sign")
def _steps(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Step functions: the derivative is 0 almost everywhere."""
    return [None]


@rule("Sqrt")
def _sqrt(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """0 at 0: keeps the gradient of the standard deviation of equal values finite."""
    y = node.outputs[0]
    zero, one, half = (tape.scalar(number, y) for number in (0.0, 1.0, 0.5))
    positive = tape.op("Greater", y, zero)
    divisor = tape.op("Where", positive, y, one)  # no second derivative divides by 0 either
    slope = tape.op("Where", positive, tape.op("Div", half, divisor), zero)
    return [tape.op("Mul", only(incoming), slope)]


@rule("Gelu")
def _gelu(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    x = input_of(node, 0)
    if "approximate" in node.attributes and node.attributes["approximate"].as_string() == "tanh":
        return [tape.op("Mul", only(incoming), _gelu_tanh_slope(tape, x))]
    scaled = tape.op("Mul", x, tape.scalar(math.sqrt(0.5), x))
    cdf = tape.op("Mul", tape.op("Add", tape.op("Erf", scaled), tape.scalar(1.0, x)), tape.scalar(0.5, x))
    density = tape.op("Exp", tape.op("Neg", tape.op("Mul", scaled, scaled)))
    slope = tape.op("Mul", tape.op("Mul", x, density), tape.scalar(1 / math.sqrt(2 * math.pi), x))
    return [tape.op("Mul", only(incoming), tape.op("Add", cdf, slope))]


def _gelu_tanh_slope(tape: Tape, x: ir.Value) -> ir.Value:
    """Of x (1 + tanh u) / 2, u = c (x + a x^3): (1 + tanh u + x (1 - tanh^2 u) c (1 + 3 a x^2)) / 2."""
    a, c = 0.044715, math.sqrt(2 / math.pi)
    square = tape.op("Mul", x, x)

    def grown(factor: float) -> ir.Value:
        """c (1 + factor x^2)."""
        inner = tape.op("Add", tape.op("Mul", square, tape.scalar(factor, x)), tape.scalar(1.0, x))
        return tape.op("Mul", inner, tape.scalar(c, x))

    tanh = tape.op("Tanh", tape.op("Mul", x, grown(a)))
    bell = tape.op("Mul", _one_minus(tape, tape.op("Mul", tanh, tanh)), tape.op("Mul", x, grown(3 * a)))
    doubled = tape.op("Add", tape.op("Add", tanh, tape.scalar(1.0, x)), bell)
    return tape.op("Mul", doubled, tape.scalar(0.5, x))


def _where_positive(tape: Tape, x: ir.Value, positive: ir.Value, other: ir.Value) -> ir.Value:
    return tape.op("Where", tape.op("Greater", x, tape.scalar(0.0, x)), positive, other)


@rule("ThresholdedRelu")
def _thresholded_relu(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    x, g = input_of(node, 0), only(incoming)
    above = tape.op("Greater", x, tape.scalar(float_attribute(node, "alpha", 1.0), x))
    return [tape.op("Where", above, g, tape.scalar(0.0, x))]


@rule("LeakyRelu", "PRelu")
def _leaky_relu(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g, x = only(incoming), input_of(node, 0)
    refuse_active(tape, node, 1)
    if node.op_type == "PRelu":
        return [_where_positive(tape, x, g, tape.op("Mul", g, input_of(node, 1))), None]
    return [
        _where_positive(tape, x, g, tape.op("Mul", g, tape.scalar(float_attribute(node, "alpha", 0.01), x)))
    ]


@rule("Elu", "Selu", "Celu")
def _elu(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Below 0, y = k (exp(x / s) - 1) with slope (y + k) / s; above 0, a line with slope m."""
    x, y = input_of(node, 0), node.outputs[0]
    if node.op_type == "Selu":
        m = float_attribute(node, "gamma", 1.05070102214813232421875)
        k, s = m * float_attribute(node, "alpha", 1.67326319217681884765625), 1.0
    else:
        m = 1.0
        k = float_attribute(node, "alpha", 1.0)
        s = k if node.op_type == "Celu" else 1.0
    below = tape.op("Mul", tape.op("Add", y, tape.scalar(k, x)), tape.scalar(1 / s, x))
    return [tape.op("Mul", only(incoming), _where_positive(tape, x, tape.scalar(m, x), below))]


@rule("HardSigmoid")
def _hard_sigmoid(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """The slope alpha where 0 < y < 1."""
    y, zero = node.outputs[0], tape.scalar(0.0, node.outputs[0])
    slope = tape.scalar(float_attribute(node, "alpha", 0.2), y)
    below_one = tape.op("Where", tape.op("Less", y, tape.scalar(1.0, y)), slope, zero)
    return [tape.op("Mul", only(incoming), _where_positive(tape, y, below_one, zero))]


@rule("HardSwish")
def _hard_swish(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """x (x / 6 + 1 / 2) between -3 and 3, 0 below and x above."""
    x = input_of(node, 0)
    line = tape.op("Add", tape.op("Mul", x, tape.scalar(1 / 3, x)), tape.scalar(0.5, x))
    above = tape.op("Where", tape.op("GreaterOrEqual", x, tape.scalar(3.0, x)), tape.scalar(1.0, x), line)
    slope = tape.op("Where", tape.op("LessOrEqual", x, tape.scalar(-3.0, x)), tape.scalar(0.0, x), above)
    return [tape.op("Mul", only(incoming), slope)]


@rule("Mish")
def _mish(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """d/dx [x tanh(softplus(x))] = h + x (1 - h^2) sigmoid(x) with h = tanh(softplus(x))."""
    x = input_of(node, 0)
    h = tape.op("Tanh", tape.op("Softplus", x))
    rest = tape.op("Mul", _one_minus(tape, tape.op("Mul", h, h)), tape.op("Mul", x, tape.op("Sigmoid", x)))
    return [tape.op("Mul", only(incoming), tape.op("Add", h, rest))]


@rule("Max", "Min")
def _extremum(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """The selected input gets the gradient; two equal inputs get half each, as in PyTorch.

    For a clamp, the bound gets nothing at a tie; :func:`passes_at_ends` decides for the value.
    """
    if len(node.inputs) != 2:
        raise ExportError(f"{node.op_type} '{node.name}' is of {len(node.inputs)} values; nest pairs of them")
    g, a, b, out = only(incoming), input_of(node, 0), input_of(node, 1), node.outputs[0]
    zero = tape.scalar(0.0, g)
    taken = "Greater" if node.op_type == "Max" else "Less"
    shares = [tape.op("Mul", g, tape.scalar(0.5, g))] * 2
    if is_clamp(node):
        shares = [g if passes_at_ends(node) else zero, zero]
    equal = tape.op("Equal", a, b)

    def part(own: ir.Value, other: ir.Value, share: ir.Value) -> ir.Value | None:
        if own not in tape.active:
            return None
        alone = tape.op("Where", tape.op(taken, own, other), g, zero)
        return tape.sum_to(tape.op("Where", equal, share, alone), own, out)

    return [part(a, b, shares[0]), part(b, a, shares[1])]
