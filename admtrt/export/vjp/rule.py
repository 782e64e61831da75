"""Signature and table of gradient rules, and helpers to read a node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx_ir as ir

from admtrt.errors import ExportError
from admtrt.export.nodes import dims_of, input_of, ints_attribute

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from admtrt.export.tape import Tape

    Gradients = Sequence[ir.Value | None]


class Rule(Protocol):
    """A gradient rule; see :mod:`admtrt.export.vjp`."""

    def __call__(self, tape: Tape, node: ir.Node, incoming: Gradients, /) -> Gradients:
        """Gradients of the node's inputs."""
        ...


RULES: dict[str, Rule] = {}


def rule(*op_types: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of the default domain.

    Raises:
        ValueError: if an operator already has a rule. Which one wins would depend on the order of imports.
    """

    def register(function: Rule) -> Rule:
        for op_type in op_types:
            if op_type in RULES:
                raise ValueError(
                    f"{op_type} has a gradient rule, in {RULES[op_type].__module__}; extend that one"
                )
            RULES[op_type] = function
        return function

    return register


def constant_of(node: ir.Node, index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]] | None:
    """The constant value of an input; None if the input is absent."""
    if index >= len(node.inputs) or node.inputs[index] is None:
        return None
    tensor = input_of(node, index).const_value
    if tensor is None:
        raise ExportError(
            f"{node.op_type} '{node.name}' computes its input {index}; a constant was expected",
            hint="Where the module computes it from its parameters, do so once, before the export.",
        )
    return tensor.numpy()


def ints_of(node: ir.Node, index: int) -> list[int] | None:
    """The constant integers of an input; None if the input is absent."""
    values = constant_of(node, index)
    return None if values is None else [int(value) for value in values.ravel()]


def refuse_active(tape: Tape, node: ir.Node, *indices: int) -> None:
    """Refuse inputs that depend on x but that a rule treats as constant: their gradient would be lost."""
    for index in indices:
        if index < len(node.inputs) and node.inputs[index] in tape.active:
            raise ExportError(
                f"no gradient rule for {node.op_type} '{node.name}' with respect to its input {index}, "
                f"'{input_of(node, index).name}', which must not depend on the differentiated input"
            )


def axes_of(node: ir.Node) -> list[int]:
    """Normalised axes of a reduction, from its second input (opset 18) or attribute."""
    rank = len(dims_of(input_of(node, 0)))
    axes = ints_of(node, 1) or ints_attribute(node, "axes", range(rank))
    return [axis % rank for axis in axes]


def only(incoming: Gradients) -> ir.Value:
    """The gradient of a node's first output, the only one that its rule knows."""
    first, *others = incoming
    if first is None or any(other is not None for other in others):
        raise ExportError("a gradient arrives through an output that its operator's rule does not cover")
    return first
