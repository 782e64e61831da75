"""The gradient rule of sampling at computed places.

With g the gradient of the output and dx the gradient of the input:

- GridSample: dx[i, j] = sum over places p of g[p] row[p, i] column[p, j], the weights of the rows and columns
  of x at p; the gradient of the places has the slopes of these weights
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx_ir as ir

from admtrt.errors import ExportError
from admtrt.export.nodes import dims_of, input_of, int_attribute
from admtrt.export.vjp.rule import only, rule

if TYPE_CHECKING:
    from admtrt.export.tape import Tape
    from admtrt.export.vjp.rule import Gradients

    _Pixels = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

_MODES = {
    "linear": "linear",
    "bilinear": "linear",
    "cubic": "cubic",
    "bicubic": "cubic",
    "nearest": "nearest",
}
_CUBIC = -0.75  # the slope of PyTorch's cubic kernel at 1


class _Axis(NamedTuple):
    """The sampling of one axis of an image at places in [-1, 1]."""

    size: int
    mode: str
    padding: str
    aligned: bool

    @property
    def ends(self) -> tuple[float, float]:
        """The places of -1 and 1, in pixels."""
        return (0.0, self.size - 1.0) if self.aligned else (-0.5, self.size - 0.5)


@rule("GridSample")
def _grid_sample(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Sampling as a product with weights, one for each row and one for each column of x."""
    x, grid, g = input_of(node, 0), input_of(node, 1), only(incoming)
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "linear"
    padding = node.attributes["padding_mode"].as_string() if "padding_mode" in node.attributes else "zeros"
    dims, places = dims_of(x), dims_of(grid)
    if len(dims) != 4 or None in (*dims[1:], *places[1:]):
        raise ExportError(f"GridSample '{node.name}' samples no images of known size")
    channels, height, width = (size or 0 for size in dims[1:])
    rows, columns = (size or 0 for size in places[1:3])
    flat = tape.op("Reshape", grid, tape.ints(-1, rows * columns, 2))
    aligned = bool(int_attribute(node, "align_corners", 0))
    weights = []
    for coordinate, size in ((1, height), (0, width)):
        place = tape.op(
            "Slice", flat, tape.ints(coordinate), tape.ints(coordinate + 1), tape.ints(2)
        )  # [N, P, 1] in [-1, 1]
        weights.append(_weights(tape, place, _Axis(size, _MODES[mode], padding, aligned)))
    (by_row, row_slope), (by_column, column_slope) = weights
    gathered = tape.op("Reshape", g, tape.ints(-1, channels, rows * columns, 1))
    gradients: list[ir.Value | None] = [None, None]

    def image(value: ir.Value) -> ir.Value:
        return tape.op("Unsqueeze", value, tape.ints(1))

    if x in tape.active:  # sum over p of g[c, p] row[p, i] column[p, j]
        weighted = tape.op("Mul", gathered, image(by_row))  # [N, C, P, H]
        turned = tape.op("Transpose", weighted, perm=[0, 1, 3, 2])
        gradients[0] = tape.op("MatMul", turned, image(by_column))
    if grid in tape.active and row_slope is not None and column_slope is not None:
        parts = []
        for left, right in ((by_row, column_slope), (row_slope, by_column)):
            seen = tape.op("MatMul", image(left), x)  # [N, C, P, W]
            value = tape.op("ReduceSum", tape.op("Mul", seen, image(right)), tape.ints(3), keepdims=1)
            parts.append(tape.op("ReduceSum", tape.op("Mul", value, gathered), tape.ints(1), keepdims=0))
        gradients[1] = tape.reshape_like(tape.op("Concat", *parts, axis=2), grid)
    return gradients


def _weights(tape: Tape, place: ir.Value, axis: _Axis) -> tuple[ir.Value, ir.Value | None]:
    """The weight of each pixel at each place, [N, P, size], and its slope; None if that is 0.

    A cubic kernel reaches pixels beyond the edge, which repeat or mirror pixels inside: they are weighed
    first, and their weights then added to those of the pixels they repeat.
    """
    low, high = axis.ends
    size, cubic = axis.size, axis.mode == "cubic"
    half = tape.scalar((high - low) / 2, place)
    at = tape.op("Add", tape.op("Mul", place, half), tape.scalar((size - 1) / 2, place))
    slope = half
    if axis.padding == "reflection":
        at, slope = _reflected(tape, at, slope, axis)
    beyond = 2 if cubic and axis.padding != "zeros" else 0
    if axis.padding != "zeros" and not (cubic and axis.padding == "reflection"):
        reach = 1 if cubic else 0  # from there on a cubic kernel sees only one value
        at, slope = _clamped(tape, at, slope, -reach, size - 1 + reach)
    pixels = np.arange(-beyond, size + beyond)
    assert place.dtype is not None
    dtype = place.dtype.numpy()
    if axis.mode == "nearest":
        equal = tape.op("Equal", tape.op("Round", at), tape.array(pixels.astype(dtype)))
        return tape.cast(equal, place.dtype), None
    apart = tape.op("Sub", tape.array(pixels.astype(dtype)), at)  # [N, P, pixels]
    weight, falling = (_cubic if cubic else _tent)(tape, tape.op("Abs", apart))
    rising = tape.op("Mul", tape.op("Mul", tape.op("Neg", tape.op("Sign", apart)), falling), slope)
    if beyond:
        inside = np.clip(pixels, 0, size - 1) if axis.padding == "border" else _mirrored(pixels, axis)
        repeats = tape.array((inside[:, None] == np.arange(size)).astype(dtype))
        weight, rising = tape.op("MatMul", weight, repeats), tape.op("MatMul", rising, repeats)
    return weight, rising


def _tent(tape: Tape, distance: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The kernel of linear interpolation, and its derivative by the distance."""
    tent = tape.op("Relu", tape.op("Sub", tape.scalar(1.0, distance), distance))
    return tent, tape.op("Neg", tape.op("Sign", tent))


def _cubic(tape: Tape, distance: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The kernel of cubic convolution (Keys 1981), and its derivative by the distance d, with a = -0.75.

    (a + 2) d^3 - (a + 3) d^2 + 1 for d < 1, a (d - 1) (d - 2)^2 for d < 2, else 0.
    """
    a, d = _CUBIC, distance

    def linear(factor: float, addend: float) -> ir.Value:
        return tape.op("Add", tape.op("Mul", d, tape.scalar(factor, d)), tape.scalar(addend, d))

    def product(*factors: ir.Value) -> ir.Value:
        first, *rest = factors
        return first if not rest else tape.op("Mul", first, product(*rest))

    def pieces(near: ir.Value, far: ir.Value) -> ir.Value:
        zero, one, two = (tape.scalar(number, d) for number in (0.0, 1.0, 2.0))
        rest = tape.op("Where", tape.op("Less", d, two), far, zero)
        return tape.op("Where", tape.op("Less", d, one), near, rest)

    to_end = linear(1, -2)
    near = tape.op("Add", product(d, d, linear(a + 2, -(a + 3))), tape.scalar(1.0, d))
    kernel = pieces(near, product(linear(a, -a), to_end, to_end))
    return kernel, pieces(
        product(d, linear(3 * (a + 2), -2 * (a + 3))), product(linear(3 * a, -4 * a), to_end)
    )


def _clamped(tape: Tape, at: ir.Value, slope: ir.Value, low: float, high: float) -> tuple[ir.Value, ir.Value]:
    """Places within two ends, and the slope, which is 0 at and beyond them."""
    first, last, zero = (tape.scalar(value, at) for value in (low, high, 0.0))
    inside = tape.op("And", tape.op("Greater", at, first), tape.op("Less", at, last))
    return tape.op("Min", tape.op("Max", at, first), last), tape.op("Where", inside, slope, zero)


def _reflected(tape: Tape, at: ir.Value, slope: ir.Value, axis: _Axis) -> tuple[ir.Value, ir.Value]:
    """Places mirrored at both ends until they are within, and the slope, whose sign turns each time."""
    low, high = axis.ends
    if low == high:
        zero = tape.scalar(0.0, at)
        return tape.op("Mul", at, zero), zero
    first, span = tape.scalar(low, at), tape.scalar(high - low, at)
    beyond = tape.op("Sub", at, first)
    turn = tape.op("Mod", tape.op("Abs", beyond), tape.scalar(2 * (high - low), at), fmod=1)
    from_middle = tape.op("Sub", turn, span)  # of a turn, at the other end
    place = tape.op("Sub", tape.scalar(high, at), tape.op("Abs", from_middle))
    sign = tape.op("Neg", tape.op("Mul", tape.op("Sign", beyond), tape.op("Sign", from_middle)))
    return place, tape.op("Mul", sign, slope)


def _mirrored(pixels: _Pixels, axis: _Axis) -> _Pixels:
    """The pixel inside that each pixel is a mirror image of."""
    low, high = axis.ends
    if low == high:
        return np.zeros_like(pixels)
    turn = np.abs(pixels - low) % (2 * (high - low))
    inside: _Pixels = (high - np.abs(turn - (high - low))).astype(np.int64)
    return inside.clip(0, axis.size - 1)
