"""Lower a float32 graph to a strongly typed one with a narrow (fp16 or bf16) torso and float32 islands.

Every node gets one type. Casts are inserted only where a value is read in another type, one per value and
type, so that no two cancel. Constants are stored in the type of their reader. Inputs and outputs stay
float32. A node's role follows from its operator and its neighbours, not from names, so the pass works for the
captured graph and its gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import onnx_ir as ir

from admtrt.errors import ExportError
from admtrt.export.nodes import LOSS
from admtrt.export.passes import remove_unused

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from admtrt.contract import Precision

Island = Literal["group_norm", "softmax", "output", "embedding", "activation", "residual"]
"""Parts that may stay float32: group norms and their backward; softmaxes and their backward; the last product
before each output and everything after it; everything that depends only on the timestep and the label;
pointwise operators; sums of the residual stream and of its gradient."""

ISLANDS: tuple[Island, ...] = get_args(Island)
DEFAULT_ISLANDS: tuple[Island, ...] = ("group_norm", "softmax", "output")

NARROW: dict[Precision, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}

_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_MOVES = frozenset(
    {"Concat", "Expand", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
    | {"Unsqueeze"}
)
_POINTWISE = frozenset(
    {"Add", "AveragePool", "Div", "Max", "Min", "Mul", "Neg", "Relu", "Resize", "Sigmoid", "Sub", "Where"}
)
_STATISTICS = frozenset(
    {"GroupNormalization", "InstanceNormalization", "LayerNormalization", "ReduceMean", "Reciprocal", "Sqrt"}
)
_SOFTMAX = frozenset({"Exp", "LogSoftmax", "ReduceSum", "Softmax"})
_NARROWED = _PRODUCTS | _MOVES | _POINTWISE | _STATISTICS | _SOFTMAX
_FIRST_INPUT_ONLY = frozenset({"Gather", "Resize"})  # other inputs are indices or float32 scales


def lower(model: ir.Model, precision: Precision, islands: Collection[Island] = DEFAULT_ISLANDS) -> None:
    """Lower a float32 graph in place.

    Args:
        model: a graph of float32 with the shapes of its values.
        precision: fp16 or bf16 for the torso; fp32 changes nothing.
        islands: parts that stay float32. Always float32 are: sines and cosines of timesteps and all they
            depend on, the losses of guides, and operators unknown to this pass; in bf16 also transposed
            convolutions, which engines lack.

    Raises:
        ExportError: if a constant exceeds the range of fp16.
    """
    if precision == "fp32":
        return
    narrow = NARROW[precision]
    wide = _wide_nodes(model.graph, frozenset(islands))
    if precision == "bf16":
        wide |= {node for node in model.graph if node.op_type == "ConvTranspose"}
    _Typing(model.graph, narrow).apply(wide)
    remove_unused(model)


def _wide_nodes(graph: ir.Graph, islands: frozenset[Island]) -> set[ir.Node]:
    """The nodes that compute in float32."""
    nodes = [node for node in graph if any(map(_is_float, (*node.inputs, *node.outputs)))]
    wide = {node for node in nodes if node.op_type not in _NARROWED or LOSS in node.metadata_props}
    wide |= _upstream([node for node in nodes if node.op_type in ("Cos", "Sin")], stop=frozenset())
    if "group_norm" in islands:
        wide |= {node for node in nodes if node.op_type in _STATISTICS}
    if "softmax" in islands:
        wide |= {node for node in nodes if node.op_type in _SOFTMAX}
    if "output" in islands:
        wide |= _upstream([value.producer() for value in graph.outputs], stop=_PRODUCTS)
    if "embedding" in islands:
        wide |= _without_images(graph, nodes)
    if "residual" in islands:
        wide |= set(filter(_is_residual_sum, nodes))
    if "activation" in islands:
        wide |= {node for node in nodes if node.op_type in _POINTWISE and not _is_residual_sum(node)}
    _absorb(nodes, wide)
    return wide


def _absorb(nodes: list[ir.Node], wide: set[ir.Node]) -> None:
    """Also widen nodes between wide nodes, where rounding would cost Casts and save nothing.

    These are pointwise operators that only wide nodes read, pointwise operators of a wide value and constants
    (the scale and bias of a norm), and data movement between wide nodes.
    """
    size = -1
    while size != len(wide):
        size = len(wide)
        for node in nodes:
            if node.op_type in _POINTWISE and node not in wide and _applies_constants(node, wide):
                wide.add(node)
        for node in reversed(nodes):
            if node in wide or not (readers := list(_readers(node))):
                continue
            wanted = [reader is None or reader in wide for reader in readers]
            fed = any(value.producer() in wide for value in _typed_inputs(node))
            if (node.op_type in _POINTWISE and all(wanted) and not _is_residual_sum(node)) or (
                node.op_type in _MOVES and any(wanted) and fed
            ):
                wide.add(node)


def _applies_constants(node: ir.Node, wide: set[ir.Node]) -> bool:
    values = list(_typed_inputs(node))
    computed = [value for value in values if value.const_value is None]
    return 0 < len(computed) < len(values) and all(value.producer() in wide for value in computed)


def _upstream(nodes: Iterable[ir.Node | None], stop: frozenset[str]) -> set[ir.Node]:
    """These nodes and all that they depend on, up to and including operators in ``stop``."""
    found: set[ir.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if node.op_type not in stop:
            waiting += [value.producer() for value in _typed_inputs(node)]
    return found


def _without_images(graph: ir.Graph, nodes: list[ir.Node]) -> set[ir.Node]:
    """Nodes that do not depend on an image input."""
    reached = {value for value in graph.inputs if value.shape is not None and len(value.shape) > 2}
    for node in graph:
        if not reached.isdisjoint(node.inputs):
            reached.update(node.outputs)
    return {node for node in nodes if reached.isdisjoint(node.outputs)}


def _is_residual_sum(node: ir.Node) -> bool:
    """True for a sum of two computed maps of equal shape, except the one in SiLU's derivative."""
    if node.op_type != "Add" or any(value is None or value.shape is None for value in node.inputs):
        return False
    sizes = [list(value.shape)[1:] for value in node.inputs if value is not None and value.shape is not None]
    producers = [value.producer() for value in node.inputs if value is not None]
    return (
        sizes[0] == sizes[1]
        and len(sizes[0]) > 1
        and all(producer is not None and producer.op_type != "Sigmoid" for producer in producers)
    )


def _typed_inputs(node: ir.Node) -> Iterator[ir.Value]:
    """The inputs that must have the node's floating-point type."""
    return (value for _, value in _typed_places(node))


def _typed_places(node: ir.Node) -> Iterator[tuple[int, ir.Value]]:
    for index, value in enumerate(node.inputs):
        if value is not None and _is_float(value) and not (index and node.op_type in _FIRST_INPUT_ONLY):
            yield index, value


def _readers(node: ir.Node) -> Iterator[ir.Node | None]:
    """The readers of a node's floating-point outputs; None stands for a graph output."""
    for value in filter(_is_float, node.outputs):
        if value.is_graph_output():
            yield None
        for use in value.uses():
            yield use.node


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()


class _Typing:
    """Assigns a type to every value and inserts the Casts."""

    def __init__(self, graph: ir.Graph, narrow: ir.DataType) -> None:
        self._graph = graph
        self._narrow = narrow
        self._converted: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def apply(self, wide: set[ir.Node]) -> None:
        for node in list(self._graph):
            dtype = ir.DataType.FLOAT if node in wide else self._narrow
            for index, value in list(_typed_places(node)):
                node.replace_input_with(index, self._as_type(value, dtype))
            for value in filter(_is_float, node.outputs):
                value.type = ir.TensorType(dtype)
                if node.op_type == "Cast":
                    node.attributes["to"] = ir.AttrInt64("to", int(dtype))
        for index, value in enumerate(self._graph.outputs):
            if value.dtype == self._narrow:
                name = value.name
                value.name = f"{name}_narrow"
                self._graph.outputs[index] = result = self._as_type(value, ir.DataType.FLOAT)
                result.name = name

    def _as_type(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value.dtype == dtype:
            return value
        key = (value, dtype)
        if key not in self._converted:
            self._converted[key] = (
                self._cast(value, dtype) if value.const_value is None else self._constant(value, dtype)
            )
        return self._converted[key]

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        node = ir.node("Cast", [value], attributes={"to": int(dtype)})
        result = node.outputs[0]
        result.type, result.shape = ir.TensorType(dtype), value.shape
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(producer, node)
        return result

    def _constant(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        assert value.const_value is not None
        exact = value.const_value.numpy()
        with np.errstate(over="ignore"):
            rounded = exact.astype(dtype.numpy())
        if not np.isfinite(rounded[np.isfinite(exact)]).all():
            raise ExportError(
                f"'{value.name}' holds {np.abs(exact).max():g}, which is beyond the range of fp16",
                hint="Use bf16 (--engine bf16), whose range is that of float32.",
            )
        name = f"{value.name}_{dtype.name.lower()}"
        tensor = ir.Tensor(rounded, dtype=dtype, name=name)
        result = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype), const_value=tensor)
        self._graph.register_initializer(result)
        return result
