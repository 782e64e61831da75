"""Replace captured operators by equivalent plain ones, which have gradient rules and run everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from admtrt.export.einsum import nodes_of_einsum
from admtrt.export.kinks import is_clamp
from admtrt.export.nodes import ATEN, input_of
from admtrt.export.passes import constant, insert_in_place_of, only_user, pass_by
from admtrt.export.recurrent import unroll
from admtrt.export.spectra import nodes_of_stft

if TYPE_CHECKING:
    from collections.abc import Callable


def plain(model: ir.Model) -> None:
    """Run every pass once."""
    for one in (
        clamps_as_clips,
        einsums_as_products,
        vectors_as_matrices,
        losses_as_selections,
        sincs_that_divide_by_no_zero,
        logarithms_times_factors,
        spectra_as_convolutions,
        drop_restriding,
        drop_whole_assignments,
        unroll,
    ):
        one(model)


def clamps_as_clips(model: ir.Model) -> bool:
    """Min(Max(x, low), high) of a clamp by two numbers -> Clip. Both give ``high`` if low > high."""
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

    PyTorch restrides the result [N, C, 1, 1] of adaptive pooling of a channels-last image. The values are the
    same.
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
    """ScatterND that assigns to the whole of a value -> the assigned value."""
    changed = False
    for node in list(model.graph):
        if node.op_type != "ScatterND" or not node.meta.get(ATEN, "").startswith("slice_scatter"):
            continue
        data, assigned = input_of(node, 0), input_of(node, 2)
        if data.shape is not None and data.shape == assigned.shape:
            changed |= pass_by(node.outputs[0], assigned)
    return changed


def einsums_as_products(model: ir.Model) -> bool:
    """Einsum -> a chain of MatMuls, with transposes and reshapes."""
    return _decompose(model, "Einsum", nodes_of_einsum)


def vectors_as_matrices(model: ir.Model) -> bool:
    """MatMul by a vector -> MatMul by a matrix of one column."""
    changed = False
    for node in list(model.graph):
        left, right = (*node.inputs, None, None)[:2]
        if node.op_type != "MatMul" or left is None or left.shape is None or len(left.shape) < 2:
            continue
        if right is None or right.shape is None or len(right.shape) != 1:
            continue
        tape = ir.tape.Tape()
        column = tape.op("Unsqueeze", [right, constant(model.graph, np.array([1]))])
        product = tape.op("MatMul", [left, column])
        tape.op("Squeeze", [product, constant(model.graph, np.array([len(left.shape) - 1]))])
        _replace(model, node, list(tape.nodes))
        changed = True
    return changed


def losses_as_selections(model: ir.Model) -> bool:
    """Cross entropies without reduction -> minus the selected log-probabilities."""
    changed = False
    for node in list(model.graph):
        if node.op_type not in ("SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"):
            continue
        reduction = node.attributes.get("reduction")
        weighed = len(node.inputs) > 2 and node.inputs[2] is not None
        read = any(output.uses() or output.is_graph_output() for output in node.outputs[1:])
        if reduction is None or reduction.as_string() != "none" or weighed or read:
            continue
        tape, one = ir.tape.Tape(), constant(model.graph, np.array([1]))
        log_p, labels = input_of(node, 0), input_of(node, 1)
        node.outputs[0].shape = labels.shape  # PyTorch records the shape of the mean
        if node.op_type == "SoftmaxCrossEntropyLoss":
            log_p = tape.op("LogSoftmax", [log_p], attributes={"axis": 1})
        dtype, float_dtype = labels.dtype, input_of(node, 0).dtype
        if dtype is None or float_dtype is None:
            continue
        ignored = None
        if "ignore_index" in node.attributes:
            index = np.array(node.attributes["ignore_index"].as_int(), dtype.numpy())
            ignored = tape.op("Equal", [labels, constant(model.graph, index)])
            labels = tape.op("Where", [ignored, constant(model.graph, np.zeros_like(index)), labels])
        places = tape.op("Unsqueeze", [labels, one])
        taken = tape.op("GatherElements", [log_p, places], attributes={"axis": 1})
        loss = tape.op("Neg", [tape.op("Squeeze", [taken, one])])
        if ignored is not None:
            tape.op("Where", [ignored, constant(model.graph, np.array(0, float_dtype.numpy())), loss])
        _replace(model, node, list(tape.nodes))
        changed = True
    return changed


def sincs_that_divide_by_no_zero(model: ir.Model) -> bool:
    """A sinc, Where(x = 0, 1, sin(u) / u) -> the same, divided by 1 at 0: no slope is infinite."""
    changed = False
    for node in list(model.graph):
        if node.op_type != "Where" or not node.meta.get(ATEN, "").startswith("sinc"):
            continue
        condition, one, quotient = (input_of(node, index) for index in range(3))
        divided = quotient.producer()
        if divided is None or divided.op_type != "Div":
            continue
        tape = ir.tape.Tape()
        divisor = tape.op("Where", [condition, one, input_of(divided, 1)])
        tape.op("Div", [input_of(divided, 0), divisor])
        _replace(model, divided, list(tape.nodes))
        changed = True
    return changed


def logarithms_times_factors(model: ir.Model) -> bool:
    """The selections of an xlogy -> x log y, with y = 1 where x is 0 and y is not positive."""
    changed = False
    for node in list(model.graph):
        if node.op_type != "Where" or not node.meta.get(ATEN, "").startswith("xlogy"):
            continue
        zeros, x, selected = (input_of(node, index) for index in range(3))
        inner = selected.producer()
        if inner is None or inner.op_type != "Where":
            continue
        y = input_of(inner, 1)
        assert y.dtype is not None
        zero, one = (constant(model.graph, np.array(number, y.dtype.numpy())) for number in (0, 1))
        tape = ir.tape.Tape()
        absent = tape.op("And", [zeros, tape.op("LessOrEqual", [y, zero])])
        tape.op("Mul", [x, tape.op("Log", [tape.op("Where", [absent, one, y])])])
        _replace(model, node, list(tape.nodes))
        changed = True
    return changed


def spectra_as_convolutions(model: ir.Model) -> bool:
    """STFT -> a Conv with windowed cosines and sines."""
    return _decompose(model, "STFT", nodes_of_stft)


def _decompose(
    model: ir.Model, operator: str, nodes_of: Callable[[ir.Graph, ir.Node], list[ir.Node]]
) -> bool:
    """Replace an operator's nodes by others, where there are any."""
    changed = False
    for node in list(model.graph):
        nodes = nodes_of(model.graph, node) if node.op_type == operator else []
        if nodes:
            _replace(model, node, nodes)
            changed = True
    return changed


def _replace(model: ir.Model, node: ir.Node, nodes: list[ir.Node]) -> None:
    for made in nodes:
        made.metadata_props.update(node.metadata_props)
        made.meta[ATEN] = node.meta.get(ATEN, "")
    insert_in_place_of(model.graph, node, nodes, node.outputs[0])
