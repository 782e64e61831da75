"""The tape that gradient rules write to: it appends backward nodes to a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir

from admtrt.export.nodes import shape_of, swapped_last, swaps_last
from admtrt.export.passes import constant, constant_sizes

if TYPE_CHECKING:
    from collections.abc import Sequence

ConvBackward = Literal["flipped", "transposed"]
"""Form of a stride-1 convolution's gradient: a Conv with flipped weights (fast on CPUs, a second copy of
the weights) or a ConvTranspose that shares them (engines)."""


_RESULT_TYPES = dict.fromkeys(("Shape", "ArgMax", "ArgMin"), ir.DataType.INT64) | dict.fromkeys(
    ("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "And", "Or"), ir.DataType.BOOL
)


class Tape:
    """Appends backward nodes to a graph; the interface that the rules are written against."""

    def __init__(self, graph: ir.Graph, *, conv_backward: ConvBackward) -> None:
        self.graph = graph
        self.conv_backward = conv_backward
        self.active: set[ir.Value] = set()
        self.gradients: dict[ir.Value, ir.Value] = {}  # by forward value; complete once all readers are done
        self.origin: ir.Node | None = None  # the forward node whose backward is being written
        self._forward = set(graph)

    def op(self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: object) -> ir.Value:
        """Append one node; returns its first output."""
        node = ir.Node(
            "",
            op_type,
            inputs,
            attributes=[ir.convenience.convert_attribute(name, value) for name, value in attributes.items()],  # type: ignore[arg-type]
            num_outputs=outputs,
        )
        if self.origin is not None:  # so that errors of engines can name the module
            node.metadata_props.update(self.origin.metadata_props)
        self.graph.append(node)
        like = inputs[1] if op_type == "Where" else inputs[0]
        assert like is not None
        dtype = _RESULT_TYPES.get(op_type, like.dtype)
        assert dtype is not None
        for output in node.outputs:
            output.dtype = dtype
        return node.outputs[0]

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Convert to another type."""
        converted = self.op("Cast", value, to=int(dtype))
        converted.dtype = dtype
        return converted

    def ints(self, *values: int) -> ir.Value:
        """A constant int64 vector."""
        return constant(self.graph, np.array(values, np.int64))

    def scalar(self, value: float, like: ir.Value) -> ir.Value:
        """A constant of the floating type of ``like``."""
        assert like.dtype is not None
        return constant(self.graph, np.array(value, like.dtype.numpy()))

    def array(self, values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ir.Value:
        """A constant tensor."""
        return constant(self.graph, values)

    def one_hot(self, indices: ir.Value, like: ir.Value, axis: int) -> ir.Value:
        """One-hot along an axis of known size, where ``indices`` has size 1."""
        shape = shape_of(like)
        size = shape[axis]
        assert isinstance(size, int)
        assert like.dtype is not None
        places = np.arange(size).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        return self.cast(self.op("Equal", indices, self.array(places)), like.dtype)

    def padded(self, value: ir.Value, before: Sequence[int], after: Sequence[int]) -> ir.Value:
        """Pad every axis with zeros."""
        if not any(before) and not any(after):
            return value
        return self.op("Pad", value, self.ints(*before, *after))

    def reshape_like(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """Reshape to the shape of a forward value; the target is constant if at most one size is dynamic."""
        shape_of(like)  # raises if unknown
        sizes = constant_sizes(like)
        target = self.op("Shape", like) if sizes is None else self.ints(*sizes)
        return self.op("Reshape", value, target)

    def sum_to(self, value: ir.Value, like: ir.Value, broadcast: ir.Value) -> ir.Value:
        """Undo broadcasting: sum ``value``, shaped as ``broadcast``, over the axes that ``like`` lacks."""
        small, large = shape_of(like), shape_of(broadcast)
        missing = len(large) - len(small)
        stretched = [
            axis + missing for axis, dim in enumerate(small) if dim == 1 and large[axis + missing] != 1
        ]
        if stretched:
            value = self.op("ReduceSum", value, self.ints(*stretched), keepdims=1)
        if missing:
            value = self.op("ReduceSum", value, self.ints(*range(missing)), keepdims=0)
        return value

    def swap_last(self, value: ir.Value) -> ir.Value:
        """Transpose the last two axes. If the value is such a transpose itself, return its source."""
        rank = len(shape_of(value))
        perm = swapped_last(rank)
        producer = value.producer()
        if producer is not None and producer.op_type == "Transpose" and swaps_last(producer, rank):
            source = producer.inputs[0]
            assert source is not None
            return source
        transposed = self.op("Transpose", value, perm=perm)
        transposed.shape = ir.Shape([shape_of(value)[axis] for axis in perm])
        return transposed

    def only_reader(self, value: ir.Value, op_type: str) -> ir.Node | None:
        """The only forward reader of a value, if there is exactly one and it is of this kind."""
        readers = [use.node for use in value.uses() if use.node in self._forward]
        if value.is_graph_output() or len(readers) != 1 or readers[0].op_type != op_type:
            return None
        return readers[0]
