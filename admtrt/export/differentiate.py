"""Reverse-mode differentiation of ONNX graphs: the input gradient as a graph of its own.

Inference engines have no autograd, so the backward pass is written out as ordinary forward operators: the
graph is walked once from its output to its input, and the rule of each operator (:mod:`admtrt.export.vjp`)
adds the few nodes of its vector-Jacobian product. Because the forward graph is captured first and its
values are used in place, no saved tensor can turn into a constant of the traced example, only values that
the gradient needs are kept, and every operator's backward is written in the form that inference engines
like. Nothing depends on PyTorch's autograd internals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir

from admtrt.errors import ExportError
from admtrt.export.passes import constant, simplify
from admtrt.export.vjp import RULES

if TYPE_CHECKING:
    from collections.abc import Sequence

ConvBackward = Literal["flipped", "transposed"]
"""How a stride-1 convolution is differentiated: a Conv with flipped weights (fast on CPUs, a second copy of
the weights) or a ConvTranspose that shares them (engines)."""


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_RESULT_TYPES = {"Shape": ir.DataType.INT64, "Less": ir.DataType.BOOL, "Greater": ir.DataType.BOOL}


class Tape:
    """Appends backward nodes to a graph; the interface that the rules are written against."""

    def __init__(self, graph: ir.Graph, *, conv_backward: ConvBackward) -> None:
        self.graph = graph
        self.conv_backward = conv_backward
        self.active: set[ir.Value] = set()

    def op(self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: object) -> ir.Value:
        """Append one node; returns its first output."""
        node = ir.Node(
            "",
            op_type,
            inputs,
            attributes=[ir.convenience.convert_attribute(name, value) for name, value in attributes.items()],  # type: ignore[arg-type]
            num_outputs=outputs,
        )
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

    def reshape_like(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """Reshape to the shape of a forward value, with constants wherever at most one size is dynamic."""
        if like.shape is None:
            raise ExportError(f"the shape of '{like.name}' is unknown; the graph cannot be differentiated")
        sizes = [dim if isinstance(dim, int) else -1 for dim in like.shape]
        if sizes.count(-1) > 1:
            return self.op("Reshape", value, self.op("Shape", like))
        return self.op("Reshape", value, self.ints(*sizes))

    def sum_to(self, value: ir.Value, like: ir.Value, broadcast: ir.Value) -> ir.Value:
        """Undo broadcasting: sum ``value``, shaped as ``broadcast``, over the axes that ``like`` lacks."""
        small, large = _shape(like), _shape(broadcast)
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
        """Transpose the last two axes; a value that is such a transpose gives its source."""
        rank = len(_shape(value))
        perm = [*range(rank - 2), rank - 1, rank - 2]
        producer = value.producer()
        if producer is not None and producer.op_type == "Transpose" and _permutation(producer, rank) == perm:
            source = producer.inputs[0]
            assert source is not None
            return source
        transposed = self.op("Transpose", value, perm=perm)
        transposed.shape = ir.Shape([_shape(value)[axis] for axis in perm])
        return transposed


def _permutation(transpose: ir.Node, rank: int) -> list[int]:
    """What a Transpose does; without the attribute it reverses the axes."""
    perm = transpose.attributes.get("perm")
    return list(reversed(range(rank))) if perm is None else list(perm.as_ints())


def _shape(value: ir.Value) -> ir.Shape:
    if value.shape is None:
        raise ExportError(f"the shape of '{value.name}' is unknown; the graph cannot be differentiated")
    return value.shape


def add_input_gradient(
    model: ir.Model, *, wrt: str, of: str, name: str, conv_backward: ConvBackward = "flipped"
) -> None:
    """Add d sum(``of``) / d ``wrt`` to a graph, in place, as the first output, called ``name``.

    Args:
        model: a forward graph with known shapes.
        wrt: name of a floating-point input.
        of: name of an output that holds one number for each sample, [N].
        name: name of the new output; it has the shape of the input.
        conv_backward: see :data:`ConvBackward`.

    Raises:
        ExportError: if the output does not depend on the input, an operator on the way has no rule, or the
            name is taken.
    """
    graph = model.graph
    source = _named(graph.inputs, wrt, "input")
    target = _named(graph.outputs, of, "output")
    if any(value.name == name for value in (*graph.inputs, *graph.outputs)):
        raise ExportError(f"the graph already has an input or output '{name}'", hint="Rename it.")
    tape = Tape(graph, conv_backward=conv_backward)
    tape.active = _depends_on(graph, source)
    if target not in tape.active:
        raise ExportError(f"output '{of}' does not depend on input '{wrt}'")
    gradients: dict[ir.Value, ir.Value] = {target: _ones_like(tape, target)}
    for node in reversed(list(graph)):
        incoming = [gradients.pop(output, None) for output in node.outputs]
        if all(gradient is None for gradient in incoming):
            continue
        for value, gradient in zip(node.inputs, _differentiate(tape, node, incoming), strict=True):
            if value is None or gradient is None or value not in tape.active:
                continue
            known = gradients.get(value)
            gradients[value] = gradient if known is None else tape.op("Add", known, gradient)
    result = gradients[source]
    result.name, result.shape = name, source.shape
    graph.outputs.insert(0, result)
    simplify(model)


def _differentiate(tape: Tape, node: ir.Node, incoming: list[ir.Value | None]) -> Sequence[ir.Value | None]:
    if not any(value in tape.active for value in node.inputs):
        return [None] * len(node.inputs)
    rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if rule is None:
        known = ", ".join(sorted(RULES))
        raise ExportError(
            f"no gradient rule for the operator '{node.op_type}' (node '{node.name}')",
            hint=f"Rewrite that part of the module with: {known}.",
        )
    return rule(tape, node, incoming)


def _named(values: Sequence[ir.Value], name: str, what: str) -> ir.Value:
    for value in values:
        if value.name == name:
            return value
    raise ExportError(f"the graph has no {what} '{name}'; it has {[value.name for value in values]}")


def _depends_on(graph: ir.Graph, source: ir.Value) -> set[ir.Value]:
    """Floating-point values through which a change of ``source`` travels."""
    active = {source}
    for node in graph:
        if any(attribute.type in _GRAPHS for attribute in node.attributes.values()):
            raise ExportError(
                f"no gradient rule for the operator '{node.op_type}' (node '{node.name}'): it is control flow"
            )
        if any(value in active for value in node.inputs):
            active.update(
                output for output in node.outputs if output.dtype is None or output.dtype.is_floating_point()
            )
    return active


def _ones_like(tape: Tape, target: ir.Value) -> ir.Value:
    shape = tape.op("Shape", target)
    assert target.dtype is not None
    return tape.op("Expand", tape.scalar(1.0, target), shape)
