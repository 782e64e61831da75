"""Operators that act on each element."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx_ir as ir

from admtrt.errors import ExportError
from admtrt.export.nodes import float_attribute
from admtrt.export.vjp.rule import (
    constant_of,
    input_of,
    only,
    refuse_active,
    rule,
)

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
    x, exponent = input_of(node, 0), constant_of(node, 1)
    if exponent is None or exponent.size != 1:
        raise ExportError(f"Pow '{node.name}' has no constant scalar exponent")
    p = float(exponent.item())
    if p == 0:
        return [None, None]
    power = x if p == 2 else tape.op("Pow", x, tape.scalar(p - 1, x))
    return [tape.op("Mul", only(incoming), tape.op("Mul", power, tape.scalar(p, x))), None]


@rule("Clip")
def _clip(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """The gradient passes where the value lies within the bounds, ends included, as in PyTorch."""
    x, g = input_of(node, 0), only(incoming)
    refuse_active(tape, node, 1, 2)
    for index, outside in ((1, "Less"), (2, "Greater")):
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
    """Register y = f(x) by its derivative as a function of x and y."""

    def product(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
        return [tape.op("Mul", only(incoming), derivative(tape, input_of(node, 0), node.outputs[0]))]

    rule(op_type)(product)


def _one_minus(tape: Tape, y: ir.Value) -> ir.Value:
    return tape.op("Sub", tape.scalar(1.0, y), y)


_unary("Exp", lambda tape, x, y: y)
_unary("Log", lambda tape, x, y: tape.op("Reciprocal", x))
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


@rule("Sqrt")
def _sqrt(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """0 at 0, the subgradient that keeps the deviation of equal values finite."""
    y, zero = node.outputs[0], tape.scalar(0.0, node.outputs[0])
    slope = tape.op("Where", tape.op("Greater", y, zero), tape.op("Div", tape.scalar(0.5, y), y), zero)
    return [tape.op("Mul", only(incoming), slope)]


@rule("Gelu")
def _gelu(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    x = input_of(node, 0)
    if "approximate" in node.attributes and node.attributes["approximate"].as_string() != "none":
        raise ExportError("no gradient rule for Gelu's tanh approximation", hint="Use the exact form.")
    scaled = tape.op("Mul", x, tape.scalar(math.sqrt(0.5), x))
    cdf = tape.op("Mul", tape.op("Add", tape.op("Erf", scaled), tape.scalar(1.0, x)), tape.scalar(0.5, x))
    density = tape.op("Exp", tape.op("Neg", tape.op("Mul", scaled, scaled)))
    slope = tape.op("Mul", tape.op("Mul", x, density), tape.scalar(1 / math.sqrt(2 * math.pi), x))
    return [tape.op("Mul", only(incoming), tape.op("Add", cdf, slope))]


@rule("LeakyRelu")
def _leaky_relu(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    g, x = only(incoming), input_of(node, 0)
    alpha = float_attribute(node, "alpha", 0.01)
    negative = tape.op("Mul", g, tape.scalar(alpha, x))
    return [tape.op("Where", tape.op("Greater", x, tape.scalar(0.0, x)), g, negative)]
