"""Emulate typed engine graphs on a CPU: products in float32, every result rounded.

CPU libraries run fp16 and bf16 graphs too, but round less: ONNX Runtime computes chains of fp16 operators in
float32, and OpenVINO chooses its own types. Their results are closer to float32 than any engine's. Here every
value of a narrow type is rounded, operator by operator. An engine that fuses operators rounds less often, so
its error should stay below this one.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from admtrt.bundle import Bundle
from admtrt.export.precision import NARROW
from admtrt.export.write import write_graph
from admtrt.runtime.backends.onnxruntime import OnnxRuntimeDenoiser

if TYPE_CHECKING:
    from collections.abc import Iterator

    from admtrt.contract import Precision

_ROUND_NOTHING = frozenset(
    {"Concat", "Expand", "Gather", "Identity", "Max", "Min", "Neg", "Pad", "Relu", "Reshape", "Slice"}
    | {"Split", "Squeeze", "Transpose", "Unsqueeze", "Where"}
)
_NARROW = frozenset(NARROW.values())


@contextmanager
def emulated(
    bundle: Bundle, engine: Precision, *, threads: int | None = None
) -> Iterator[OnnxRuntimeDenoiser]:
    """The engine graphs of one precision, emulated on ONNX Runtime.

    Args:
        bundle: a verified bundle.
        engine: the precision; in fp32 nothing is rounded.
        threads: threads per operator; None takes every core.

    Raises:
        BundleError: if the bundle has no engine graphs in this precision.
    """
    typed = bundle.with_engine(engine)
    with tempfile.TemporaryDirectory(prefix="admtrt-") as folder:
        for name, entry in typed.manifest.graphs.items():
            with typed.reading(name) as path:
                model = ir.load(path)
                emulate(model)  # reads every weight
            write_graph(model, Path(folder) / entry.file)
        yield OnnxRuntimeDenoiser(Bundle(Path(folder), typed.manifest, typed.digest), threads=threads)


def emulate(model: ir.Model) -> None:
    """Turn a typed graph, in place, into a float32 graph with the same rounding."""
    graph = model.graph
    for value in graph.initializers.values():
        if value.dtype in _NARROW:
            assert value.const_value is not None
            exact = value.const_value.numpy().astype("float32")
            value.const_value, value.type = (
                ir.tensor(exact, name=value.name),
                ir.TensorType(ir.DataType.FLOAT),
            )
    for node in list(graph):
        for value in node.outputs:
            dtype = value.dtype
            if dtype is None or dtype not in _NARROW:
                continue
            if node.op_type == "Cast":
                _widen_after(graph, node, value)
                continue
            value.type = ir.TensorType(ir.DataType.FLOAT)
            if node.op_type not in _ROUND_NOTHING:
                rounding = ir.node("Cast", [value], attributes={"to": int(dtype)})
                _insert(graph, node, rounding, value, dtype)
                _widen_after(graph, rounding, rounding.outputs[0])


def _widen_after(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Convert a narrow value to float32 for all its readers."""
    _insert(graph, node, ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}), value)


def _insert(
    graph: ir.Graph, after: ir.Node, node: ir.Node, value: ir.Value, dtype: ir.DataType = ir.DataType.FLOAT
) -> None:
    """Put a node between a value and its readers."""
    result = node.outputs[0]
    result.type, result.shape = ir.TensorType(dtype), value.shape
    readers = [use for use in value.uses() if use.node is not node]
    graph.insert_after(after, node)
    for reader, index in readers:
        reader.replace_input_with(index, result)
