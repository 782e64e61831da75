"""The engine form of a graph: small passes on a copy of the captured graph.

It uses opset 22, the first in which convolutions may be bf16.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import onnx_ir as ir
from onnxscript.version_converter import convert_version

from admtrt.errors import ExportError
from admtrt.export.nodes import float_attribute, swapped_last, swaps_last
from admtrt.export.passes import constant, insert_in_place_of, only_user, simplify

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Weights = NDArray[Any]

ENGINE_OPSET = 22


def engine_form(model: ir.Model) -> ir.Model:
    """Make the engine form of a captured or differentiated graph: a copy that shares the weights.

    Raises:
        ExportError: if an operator has no form in :data:`ENGINE_OPSET`.
    """
    made = model.clone()
    convert_version(made, ENGINE_OPSET)
    if made.opset_imports[""] != ENGINE_OPSET:
        raise ExportError(f"the graph cannot be converted to opset {ENGINE_OPSET}")
    fuse_group_norms(made)
    put_queries_first(made)
    simplify(made)
    return made


class _GroupNorm(NamedTuple):
    """Pattern of one GroupNormalization: ``result`` from ``x``, both [N, C, ...], with constants [C].

    ``target`` is the shape input that reshapes to the result; None if no reshape is needed.
    """

    x: ir.Value
    result: ir.Value
    target: ir.Value | None
    gamma: Weights
    beta: Weights


def fuse_group_norms(model: ir.Model) -> bool:
    """Reshape - InstanceNormalization - Reshape (- Mul - Add) -> GroupNormalization.

    A norm whose normalised groups have other readers, as in a gradient graph, is not fused: they would be
    computed twice.
    """
    changed = False
    for node in list(model.graph):
        found = _match_group_norm(node) if node.op_type == "InstanceNormalization" else None
        if found is None:
            continue
        groups = _dims(node.inputs[0])[1]
        assert isinstance(groups, int)
        epsilon = float_attribute(node, "epsilon", 1e-5)
        fused = ir.node(
            "GroupNormalization",
            [found.x, constant(model.graph, found.gamma), constant(model.graph, found.beta)],
            attributes={"num_groups": groups, "epsilon": epsilon},
        )
        nodes = [fused]
        if found.target is not None:
            fused.outputs[0].shape, fused.outputs[0].type = found.x.shape, found.x.type
            nodes.append(ir.node("Reshape", [fused.outputs[0], found.target]))
        insert_in_place_of(model.graph, node, nodes, found.result)
        changed = True
    return changed


def put_queries_first(model: ir.Model) -> bool:
    """``v p'`` -> ``(p v')'`` for a softmax p: the form of attention that engines fuse into one kernel.

    A p with other readers, as in a gradient graph, is left alone.
    """
    changed = False
    for softmax in list(model.graph):
        turned = only_user(softmax.outputs[0], "Transpose") if softmax.op_type == "Softmax" else None
        product = None if turned is None else only_user(turned.outputs[0], "MatMul")
        if turned is None or product is None or product.inputs[1] is not turned.outputs[0]:
            continue
        values, weights, result = product.inputs[0], softmax.outputs[0], product.outputs[0]
        rank = len(_dims(values))
        swap = swapped_last(rank)
        if values is None or rank < 3 or not swaps_last(turned, rank):
            continue
        columns = ir.node("Transpose", [values], attributes={"perm": swap})
        rows = ir.node("MatMul", [weights, columns.outputs[0]])
        back = ir.node("Transpose", [rows.outputs[0]], attributes={"perm": swap})
        for made in (columns, rows):
            made.outputs[0].type = result.type
        insert_in_place_of(model.graph, product, [columns, rows, back], result)
        changed = True
    return changed


def _match_group_norm(norm: ir.Node) -> _GroupNorm | None:
    grouped, scale, bias = norm.inputs
    split = None if grouped is None else grouped.producer()
    merge = only_user(norm.outputs[0], "Reshape")
    if split is None or split.op_type != "Reshape" or merge is None:
        return None
    if scale is None or bias is None or scale.const_value is None or bias.const_value is None:
        return None
    constants = (scale.const_value.numpy(), bias.const_value.numpy())
    x, result = split.inputs[0], merge.outputs[0]
    dims, groups = _dims(x), _dims(grouped)
    if x is None or len(dims) < 3 or len(groups) != 3 or len(_dims(result)) < 3:
        return None
    channels, count = dims[1], groups[1]
    if not isinstance(channels, int) or not isinstance(count, int) or channels % count:
        return None
    if _dims(result)[1] != channels:
        return None
    # Samples must not mix: all three shapes must have the same number of values per sample.
    if _size(dims) is None or not _size(dims) == _size(groups) == _size(_dims(result)):
        return None
    target = None if _dims(result)[1:] == dims[1:] else merge.inputs[1]
    gamma, beta = (values.repeat(channels // count) for values in constants)
    return _with_affine(_GroupNorm(x, result, target, gamma, beta))


def _with_affine(norm: _GroupNorm) -> _GroupNorm:
    """Include a following ``* gamma + beta`` if both are constants with one value per channel."""
    dims = _dims(norm.result)
    product = _channel_constant(norm.result, "Mul", dims)
    total = None if product is None else _channel_constant(product[0], "Add", dims)
    if product is None or total is None:
        return norm
    gamma, beta = norm.gamma * product[1], norm.beta * product[1] + total[1]
    return norm._replace(result=total[0], gamma=gamma, beta=beta)


def _channel_constant(
    value: ir.Value, op_type: str, dims: Sequence[object]
) -> tuple[ir.Value, Weights] | None:
    """The result of the one node that reads ``value``, and its constant operand as [C]."""
    node = only_user(value, op_type)
    other = None if node is None else next((given for given in node.inputs if given is not value), None)
    if node is None or other is None or other.const_value is None:
        return None
    shape = [dims[1], *[1] * (len(dims) - 2)]
    if _dims(other) not in (shape, [1, *shape]):
        return None
    return node.outputs[0], other.const_value.numpy().reshape(-1)


def _size(dims: Sequence[object]) -> int | None:
    """Number of values of one sample; None if a size is unknown."""
    sizes = [dim for dim in dims[1:] if isinstance(dim, int)]
    return math.prod(sizes) if len(sizes) == len(dims) - 1 else None


def _dims(value: ir.Value | None) -> list[object]:
    """The sizes, dynamic ones by name; empty if the shape is unknown."""
    if value is None or value.shape is None:
        return []
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]
