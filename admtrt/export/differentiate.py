"""Reverse-mode differentiation of ONNX graphs: the input gradient as a graph of its own.

Inference engines have no autograd, so the backward pass is written out as ordinary forward operators: the
graph is walked once from its output to its input, and the rule of each operator (:mod:`admtrt.export.vjp`)
adds the few nodes of its vector-Jacobian product. The forward graph is captured first and its values are used
in place. Therefore no saved tensor can become a constant of the traced example, and only values that the
gradient needs are kept. Every backward is written in operators that inference engines run well. Nothing
depends on PyTorch's autograd internals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from admtrt.brief import few
from admtrt.errors import ExportError
from admtrt.export.nodes import module_of
from admtrt.export.passes import free_name, simplify
from admtrt.export.tape import ConvBackward, Tape
from admtrt.export.vjp import RULES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admtrt.export.vjp.rule import Rule

_LABEL_HINT = "Write the score of a label as F.log_softmax(logits, -1).gather(1, y[:, None])."
_SIZE_HINT = "All axes but the batch must have the size of the example."
_INDEX_HINT = "Select by a list or a constant tensor, or along one axis with x.gather(dim, index)."
_HINTS = {
    "SoftmaxCrossEntropyLoss": _LABEL_HINT,
    "GatherND": f"{_LABEL_HINT} {_INDEX_HINT}",
    "Gather": _INDEX_HINT,
    "GatherElements": _INDEX_HINT,
    "AveragePool": _SIZE_HINT,
    "MaxPool": _SIZE_HINT,
    "Pad": f"{_SIZE_HINT} Do not pad the batch.",
    "Resize": f"{_SIZE_HINT} Enlarge by whole factors with mode='nearest', or write it as a matrix product.",
}
_MOST = 10  # missing rules that a message lists
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


class NothingToDifferentiateError(ExportError):
    """The derivative is 0 everywhere."""


def add_input_gradient(
    model: ir.Model,
    *,
    wrt: str,
    of: str,
    name: str,
    cotangent: str | None = None,
    conv_backward: ConvBackward = "flipped",
) -> None:
    """Add d sum(``of`` * ``cotangent``) / d ``wrt`` to a graph, in place, as the first output.

    The result can be differentiated again: if ``of`` is a gradient, the new output is the product of the
    Hessian and the cotangent.

    Args:
        model: a forward graph with known shapes.
        wrt: name of a floating-point input.
        of: name of an output.
        name: name of the new output; it has the shape of the input.
        cotangent: name of a new input that weighs the elements of ``of`` and has its shape; None weighs all
            by 1.
        conv_backward: see :data:`ConvBackward`.

    Raises:
        ExportError: if the output does not depend on the input, an operator between them has no rule, or a
            name is taken.
    """
    graph = model.graph
    source = _named(graph.inputs, wrt, "input")
    target = _named(graph.outputs, of, "output")
    taken = {value.name for value in (*graph.inputs, *graph.outputs)} & {name, cotangent}
    if taken or name == cotangent:
        raise ExportError(
            f"the graph already has an input or output '{(*taken, name)[0]}'", hint="Rename it."
        )
    tape = Tape(graph, conv_backward=conv_backward)
    tape.active = _depends_on(graph, source)
    if target not in tape.active:
        raise NothingToDifferentiateError(f"output '{of}' does not depend on input '{wrt}'")
    gaps: list[ExportError] = []
    gradients = tape.gradients
    if cotangent is None:
        gradients[target] = _ones_like(tape, target)
    else:
        cotangent = free_name(graph, cotangent)
        gradients[target] = ir.Value(name=cotangent, shape=target.shape, type=target.type)
        graph.inputs.append(gradients[target])
    for node in reversed(list(graph)):
        incoming = [gradients.get(output) for output in node.outputs]
        if all(gradient is None for gradient in incoming):
            continue
        tape.origin = node
        try:
            passed = _differentiate(tape, node, incoming)
        except ExportError as error:
            gaps.append(_told(error, node))
            passed = node.inputs  # a placeholder, to find further missing rules
        for value, gradient in zip(node.inputs, passed, strict=True):
            if value is None or gradient is None or value not in tape.active:
                continue
            if gradient is not value:
                gradient.shape = value.shape  # shape inference loses the batch axis at reshapes
            known = gradients.get(value)
            gradients[value] = gradient if known is None else tape.op("Add", known, gradient)
    _refuse(gaps)
    result = gradients.get(source)
    if result is None:
        raise NothingToDifferentiateError(
            f"output '{of}' depends on input '{wrt}' by nothing that has a gradient"
        )
    if result.is_graph_input() or result.is_graph_output():
        result = tape.op("Identity", result)
    result.name, result.shape = free_name(graph, name), source.shape
    graph.outputs.insert(0, result)
    simplify(model)


def _differentiate(tape: Tape, node: ir.Node, incoming: list[ir.Value | None]) -> Sequence[ir.Value | None]:
    if not any(value in tape.active for value in node.inputs):
        return [None] * len(node.inputs)
    return _rule_for(node)(tape, node, incoming)


def refuse_unknown(model: ir.Model) -> None:
    """Refuse a graph with an operator that has no rule.

    Raises:
        ExportError: naming the operator.
    """
    gaps = []
    for node in model.graph:
        if any(value.dtype is None or value.dtype.is_floating_point() for value in node.outputs):
            try:
                _rule_for(node)
            except ExportError as error:
                gaps.append(_told(error, node))
    _refuse(gaps)


def _told(error: ExportError, node: ir.Node) -> ExportError:
    """Add to a message the module that a node comes from, and make the error with its hint."""
    return ExportError(f"{error.message}{module_of(node)}", hint=error.hint or _HINTS.get(node.op_type, ""))


def _refuse(gaps: list[ExportError]) -> None:
    """Report all missing rules in one error.

    Raises:
        ExportError: if any rule is missing.
    """
    messages = list(dict.fromkeys(gap.message for gap in reversed(gaps)))  # in the order of the forward graph
    if not messages:
        return
    hint = "\n".join(dict.fromkeys(gap.hint for gap in reversed(gaps) if gap.hint))
    if len(messages) == 1:
        raise ExportError(messages[0], hint=hint)
    listed = "".join(f"\n- {message}" for message in few(messages, _MOST))
    raise ExportError(f"{len(messages)} parts of the graph have no gradient:{listed}", hint=hint)


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
    """The floating-point values that depend on ``source``."""
    active = {source}
    for node in graph:
        if any(attribute.type in _GRAPHS for attribute in node.attributes.values()):
            raise ExportError(
                f"no gradient rule for the operator '{node.op_type}' (node '{node.name}')"
                f"{module_of(node)}: it is control flow"
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
