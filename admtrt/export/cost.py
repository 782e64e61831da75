"""Cost of a graph for one sample: operations of its products, and memory of its activations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from admtrt.export.nodes import int_attribute

if TYPE_CHECKING:
    import onnx_ir as ir


def operations(model: ir.Model) -> int:
    """Multiplications and additions of all convolutions and matrix products for one sample."""
    return sum(_operations(node) for node in model.graph)


def peak_bytes(model: ir.Model) -> int:
    """Peak bytes of live activations for one sample, without weights.

    Assumes that every node allocates its results; libraries that work in place need less.
    """
    last: dict[ir.Value, ir.Node | None] = {}
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.const_value is None:
                last[value] = node
    for value in model.graph.outputs:
        last[value] = None
    alive = sum(_bytes(value) for value in model.graph.inputs)
    peak = alive
    for node in model.graph:
        alive += sum(_bytes(value) for value in node.outputs if value in last)
        peak = max(peak, alive)
        alive -= sum(
            _bytes(value) for value in {*node.inputs} if value is not None and last.get(value) is node
        )
    return peak


def _operations(node: ir.Node) -> int:
    """Operations of one node: 2 per multiplication and addition."""
    if node.op_type in ("Conv", "ConvTranspose"):
        weight = _sizes(node.inputs[1])
        # A convolution works per output position, a transposed convolution per input position.
        places = _sizes(node.outputs[0] if node.op_type == "Conv" else node.inputs[0])
        return 2 * math.prod(places) * math.prod(weight[1:])
    if node.op_type in ("MatMul", "Gemm"):
        first, result = _sizes(node.inputs[0]), _sizes(node.outputs[0])
        inner = first[0] if node.op_type == "Gemm" and int_attribute(node, "transA", 0) else first[-1]
        return 2 * math.prod(result) * inner
    return 0


def _bytes(value: ir.Value) -> int:
    dtype = value.dtype
    return 0 if dtype is None else math.ceil(math.prod(_sizes(value)) * dtype.itemsize)


def _sizes(value: ir.Value | None) -> list[int]:
    """The shape for a batch of 1; the batch is the only dynamic size."""
    if value is None or value.shape is None:
        return [0]
    return [dim if isinstance(dim, int) else 1 for dim in value.shape]
