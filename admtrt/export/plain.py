"""Captured operators as plainer ones that compute the same, which have gradient rules and run everywhere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from admtrt.export.kinks import is_clamp
from admtrt.export.nodes import ATEN
from admtrt.export.passes import constant, insert_in_place_of, only_user, pass_by
from admtrt.export.vjp.rule import input_of

if TYPE_CHECKING:
    from collections.abc import Sequence


def plain(model: ir.Model) -> None:
    """Run every pass of this module once."""
    for one in (clamps_as_clips, einsums_as_products, drop_restriding, drop_whole_assignments):
        one(model)


def clamps_as_clips(model: ir.Model) -> bool:
    """Min(Max(x, low), high) of a clamp by two numbers -> Clip; both give ``high`` where low > high."""
    changed = False
    for node in list(model.graph):
        inner = None if node.op_type != "Min" or node.inputs[0] is None else node.inputs[0].producer()
        if inner is None or inner.op_type != "Max" or not is_clamp(node) or not is_clamp(inner):
            continue
        bounds = [*inner.inputs[1:], *node.inputs[1:]]
        scalars = [b for b in bounds if b is not None and b.const_value is not None and b.shape == ()]
        if len(scalars) != 2 or only_user(inner.outputs[0], "Min") is not node:
            continue
        _replace(model, node, [ir.node("Clip", [inner.inputs[0], *scalars])])
        changed = True
    return changed


def drop_restriding(model: ir.Model) -> bool:
    """Gather(Reshape(x)) by the strides of an as_strided -> x of the same shape.

    PyTorch restrides what adaptive pooling made of a channels-last image, [N, C, 1, 1]: the same values.
    """
    changed = False
    for node in list(model.graph):
        flat = None if node.op_type != "Gather" or node.inputs[0] is None else node.inputs[0].producer()
        if flat is None or flat.op_type != "Reshape" or not node.meta.get(ATEN, "").startswith("as_strided"):
            continue
        source = flat.inputs[0]
        if source is None or source.shape is None or source.shape != node.outputs[0].shape:
            continue
        if len(source.shape) == 4 and list(source.shape[2:]) == [1, 1]:
            changed |= pass_by(node.outputs[0], source)
    return changed


def drop_whole_assignments(model: ir.Model) -> bool:
    """ScatterND of an assignment to a slice that is all of its value -> what is assigned."""
    changed = False
    for node in list(model.graph):
        if node.op_type != "ScatterND" or not node.meta.get(ATEN, "").startswith("slice_scatter"):
            continue
        data, assigned = input_of(node, 0), input_of(node, 2)
        if data.shape is not None and data.shape == assigned.shape:
            changed |= pass_by(node.outputs[0], assigned)
    return changed


def einsums_as_products(model: ir.Model) -> bool:
    """An Einsum of two operands -> MatMul, with the Transpose and Reshape around it that it needs."""
    changed = False
    for node in list(model.graph):
        nodes = _product(model.graph, node) if node.op_type == "Einsum" and len(node.inputs) == 2 else []
        if nodes:
            _replace(model, node, nodes)
            changed = True
    return changed


def _product(graph: ir.Graph, einsum: ir.Node) -> list[ir.Node]:
    """Nodes of an Einsum; none where a label repeats, is summed in one operand alone, or differs in size."""
    given, _, out = einsum.attributes["equation"].as_string().replace(" ", "").partition("->")
    labels = given.split(",")
    sizes: dict[str, int | ir.SymbolicDim] = {}
    for own, operand in zip(labels, einsum.inputs, strict=True):
        if (
            operand is None
            or operand.shape is None
            or len(operand.shape) != len(own)
            or len({*own}) != len(own)
        ):
            return []
        if any(sizes.setdefault(label, size) != size for label, size in zip(own, operand.shape, strict=True)):
            return []
    a, b = labels
    if not {*a} ^ {*b} <= {*out} <= {*a, *b} or len({*out}) != len(out):
        return []
    operands = [input_of(einsum, 0), input_of(einsum, 1)]
    if out and out[-1] in a and out[-1] not in b:  # the columns of the result are those of the right operand
        a, b, operands = b, a, operands[::-1]
    batch = [[label] for label in out if label in a and label in b]
    shared = [label for label in a if label in b and label not in out]
    rows, columns = ([label for label in out if label in own and [label] not in batch] for own in (a, b))
    tape = ir.tape.Tape()

    def arranged(value: ir.Value, own: Sequence[str], groups: Sequence[Sequence[str]]) -> ir.Value:
        """A value's axes in the order of the groups, each group as one axis."""
        order = [label for group in groups for label in group]
        if order != list(own):
            value = tape.op("Transpose", [value], attributes={"perm": [own.index(label) for label in order]})
        return value if all(len(group) == 1 for group in groups) else reshaped(value, groups)

    def reshaped(value: ir.Value, groups: Sequence[Sequence[str]]) -> ir.Value:
        merged = [[sizes[label] for label in group] for group in groups]
        target = [math.prod(s for s in group if isinstance(s, int)) for group in merged]
        for index, group in enumerate(merged):
            if not all(isinstance(size, int) for size in group):
                target[index] = -1
        return tape.op("Reshape", [value, constant(graph, np.array(target, np.int64))])

    if sum(not isinstance(size, int) for size in sizes.values()) > 1:
        return []  # a Reshape has room for one unknown size
    left = arranged(operands[0], a, [*batch, rows, shared])
    right = arranged(operands[1], b, [*batch, shared, columns])
    product = tape.op("MatMul", [left, right])
    every = [*(label for group in batch for label in group), *rows, *columns]
    if len(rows) != 1 or len(columns) != 1:
        product = reshaped(product, every)
    arranged(product, every, list(out))
    return list(tape.nodes)


def _replace(model: ir.Model, node: ir.Node, nodes: list[ir.Node]) -> None:
    for made in nodes:
        made.metadata_props.update(node.metadata_props)
        made.meta[ATEN] = node.meta.get(ATEN, "")
        for output in made.outputs:
            output.type = node.outputs[0].type
    insert_in_place_of(model.graph, node, nodes, node.outputs[0])
