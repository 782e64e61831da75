"""Reverse-mode differentiation of ONNX graphs: the input gradient as a graph of its own.

Inference engines have no autograd, so the backward pass is written out as ordinary forward operators: the
graph is walked once from its output to its input, and the rule of each operator (:mod:`admtrt.export.vjp`)
adds the few nodes of its vector-Jacobian product. Because the forward graph is captured first and its
values are used in place, no saved tensor can turn into a constant of the traced example, only values that
the gradient needs are kept, and every operator's backward is written in the form that inference engines
like. Nothing depends on PyTorch's autograd internals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from admtrt.errors import ExportError
from admtrt.export.passes import simplify
from admtrt.export.tape import ConvBackward, Tape
from admtrt.export.vjp import RULES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admtrt.export.vjp.rule import Rule

_LABEL_HINT = "Write the score of a label as F.log_softmax(logits, -1).gather(1, y[:, None])."
_HINTS = dict.fromkeys(("GatherND", "SoftmaxCrossEntropyLoss"), _LABEL_HINT)
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


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
    gradients = tape.gradients
    gradients[target] = _ones_like(tape, target)
    for node in reversed(list(graph)):
        incoming = [gradients.get(output) for output in node.outputs]
        if all(gradient is None for gradient in incoming):
            continue
        tape.origin = node
        for value, gradient in zip(node.inputs, _differentiate(tape, node, incoming), strict=True):
            if value is None or gradient is None or value not in tape.active:
                continue
            gradient.shape = value.shape  # reshapes hide the batch axis from shape inference
            known = gradients.get(value)
            gradients[value] = gradient if known is None else tape.op("Add", known, gradient)
    result = gradients.get(source)
    if result is None:
        raise ExportError(f"output '{of}' depends on input '{wrt}' by nothing that has a gradient")
    result.name, result.shape = name, source.shape
    graph.outputs.insert(0, result)
    simplify(model)


def _differentiate(tape: Tape, node: ir.Node, incoming: list[ir.Value | None]) -> Sequence[ir.Value | None]:
    if not any(value in tape.active for value in node.inputs):
        return [None] * len(node.inputs)
    return _rule_for(node)(tape, node, incoming)


def refuse_unknown(model: ir.Model) -> None:
    """Refuse a graph with an operator that has no rule.

    Raises:
        ExportError: naming it.
    """
    for node in model.graph:
        if any(value.dtype is None or value.dtype.is_floating_point() for value in node.outputs):
            _rule_for(node)


def _rule_for(node: ir.Node) -> Rule:
    rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if rule is None:
        known = ", ".join(sorted(RULES))
        raise ExportError(
            f"no gradient rule for the operator '{node.op_type}' (node '{node.name}')",
            hint=_HINTS.get(node.op_type, f"Rewrite that part of the module with: {known}."),
        )
    return rule


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
