"""Gradient rules of linear maps along axes: resizing and padding. The gradients are matrix products.

With g the gradient of the output and dx the gradient of the input:

- Resize: dx = g M along each axis, M [out, in] the weights of each input; the sum of g over whole tiles
- Pad: dx = g without the padding; for reflected, repeated or wrapped padding, g M along each axis
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from admtrt.errors import ExportError
from admtrt.export.nodes import TILING, dims_of, enlargement_of, input_of, ints_attribute
from admtrt.export.vjp.rule import constant_of, ints_of, only, rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from admtrt.export.tape import Tape
    from admtrt.export.vjp.rule import Gradients


def along(tape: Tape, value: ir.Value, axis: int, rank: int, matrix: NDArray[Any]) -> ir.Value:
    """Multiply one axis by a matrix: the sum over j of value[..., j, ...] matrix[j, i]."""
    assert value.dtype is not None
    matrix = matrix.astype(value.dtype.numpy())
    if axis == rank - 1:
        return tape.op("MatMul", value, tape.array(matrix))
    if axis == rank - 2:
        return tape.op("MatMul", tape.array(np.ascontiguousarray(matrix.T)), value)
    last = [a for a in range(rank) if a != axis] + [axis]
    product = tape.op("MatMul", tape.op("Transpose", value, perm=last), tape.array(matrix))
    return tape.op("Transpose", product, perm=[last.index(a) for a in range(rank)])


def enlarged(tape: Tape, value: ir.Value, factors: Sequence[int]) -> ir.Value:
    """Repeat every position of an image."""
    scales = tape.array(np.array([1, 1, *factors], np.float32))
    return tape.op("Resize", value, None, scales, **TILING)


@rule("Resize")
def _resize(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Nearest-neighbour upsampling by integer factors: sums over tiles. Otherwise a matrix per axis."""
    x, g = input_of(node, 0), only(incoming)
    nothing = [None] * (len(node.inputs) - 1)
    factors = enlargement_of(node)
    if factors is not None:
        pooled = tape.op("AveragePool", g, kernel_shape=factors, strides=factors)
        return [tape.op("Mul", pooled, tape.scalar(math.prod(factors), x)), *nothing]
    sizes, out_sizes = dims_of(x), dims_of(node.outputs[0])
    rank = len(sizes)
    scales = constant_of(node, 2)
    if scales is not None and not scales.size:
        scales = None
    axes = [axis % rank for axis in ints_attribute(node, "axes", range(rank))]
    by_axis = {} if scales is None else dict(zip(axes, scales.tolist(), strict=True))
    for axis, (size, out_size) in enumerate(zip(sizes, out_sizes, strict=True)):
        if by_axis.get(axis, 1) == 1 and size == out_size:
            continue
        if axis == 0 or size is None or out_size is None:
            raise ExportError(f"Resize '{node.name}' has an axis of unknown size")
        g = along(tape, g, axis, rank, _resizing(node, size, out_size, by_axis.get(axis)))
    return [g, *nothing]


def _resizing(node: ir.Node, size: int, out_size: int, scale: float | None) -> NDArray[Any]:
    """Weights [out_size, size] of each input in each output along one axis, as ONNX defines them."""
    if all(name in node.attributes and node.attributes[name].as_string() == TILING[name] for name in TILING):
        # In float32, like the libraries: rounding decides between two positions near an integer quotient.
        factor = np.float32(out_size / size if scale is None else scale)
        places = np.floor(np.arange(out_size, dtype=np.float32) / factor).astype(np.int64)
        return selection(np.minimum(places, size - 1), size)
    attributes: dict[str, Any] = {
        name: attribute.as_string() if attribute.type == ir.AttributeType.STRING else attribute.value
        for name, attribute in node.attributes.items()
        if name != "axes"
    }
    if attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise ExportError(f"Resize '{node.name}' crops")
    attributes.pop("keep_aspect_ratio_policy", None)  # the sizes already reflect it
    if scale is None:
        inputs, given = ["x", "", "", "c"], helper.make_tensor("c", TensorProto.INT64, [2], [size, out_size])
    else:
        inputs, given = ["x", "", "c"], helper.make_tensor("c", TensorProto.FLOAT, [2], [1, scale])
    resize = helper.make_node("Resize", inputs, ["y"], **attributes)
    graph = helper.make_graph(
        [resize],
        "resize",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, [size, size])],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)],
        [given],
    )
    opset = helper.make_opsetid("", 19)
    one_for_each = np.eye(size)
    evaluator: Any = ReferenceEvaluator(helper.make_model(graph, opset_imports=[opset]))
    taken = np.asarray(evaluator.run(None, {"x": one_for_each})[0])
    assert taken.shape == (size, out_size)
    return np.ascontiguousarray(taken.T)


@rule("Pad")
def _pad(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Constant padding: a slice. Reflected, repeated or wrapped padding: sums."""
    g, pads, dims = only(incoming), ints_of(node, 1), dims_of(input_of(node, 0))
    rank = len(dims)
    assert pads is not None
    axes = [axis % rank for axis in (ints_of(node, 3) or range(rank))]
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
    cut: list[tuple[int, int, int]] = []
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        if not before and not after:
            continue
        size = dims[axis]
        if size is None:
            raise ExportError(f"Pad '{node.name}' pads an axis of unknown size")
        places = np.arange(size)
        around = (max(before, 0), max(after, 0))
        constant = {"constant_values": -1} if mode == "constant" else {}
        places = np.pad(places, around, mode=mode, **constant)  # type: ignore[call-overload]
        places = places[max(-before, 0) : len(places) - max(-after, 0)]
        if mode == "constant" and min(before, after) >= 0:
            cut.append((before, before + size, axis))
        else:
            g = along(tape, g, axis, rank, selection(places, size))
    if cut:
        starts, ends, at = zip(*cut, strict=True)
        g = tape.op("Slice", g, tape.ints(*starts), tape.ints(*ends), tape.ints(*at))
    return [g, *([None] * (len(node.inputs) - 1))]


def selection(places: NDArray[Any], size: int) -> NDArray[Any]:
    """A one-hot matrix: row i has a 1 in column ``places[i]``; -1 gives a row of zeros."""
    return np.asarray(places.reshape(-1, 1) == np.arange(size), np.float64)
