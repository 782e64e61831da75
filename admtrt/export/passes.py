"""Small graph passes: each does one thing to a model in place and says whether it changed it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
    TopologicalSortPass,
)


def simplify(model: ir.Model) -> None:
    """Run every pass that a freshly captured or differentiated graph needs, until nothing changes."""
    infer_shapes(model)
    changed = True
    while changed:
        changed = False
        for one in (static_reshapes, cancel_reshapes, cancel_transposes, remove_identities, share_equal_nodes):
            changed |= one(model)
        changed |= remove_unused(model)
    TopologicalSortPass()(model)
    infer_shapes(model)


def infer_shapes(model: ir.Model) -> None:
    """Fill in the type and shape of every value."""
    ShapeInferencePass(check_type=True, data_prop=True)(model)


def remove_unused(model: ir.Model) -> bool:
    """Drop nodes and initializers that reach no output."""
    return bool(RemoveUnusedNodesPass()(model).modified)


def share_equal_nodes(model: ir.Model) -> bool:
    """Compute what is computed twice from the same inputs once, and keep equal constants once."""
    changed = CommonSubexpressionEliminationPass()(model).modified
    # Large tensors are compared by identity only: hashing gigabytes of weights finds nothing.
    return bool(DeduplicateInitializersPass(size_limit=1024)(model).modified) or bool(changed)


def static_reshapes(model: ir.Model) -> bool:
    """Replace a Reshape's computed target by a constant where at most one size is dynamic."""
    changed = False
    for node in model.graph:
        if node.op_type != "Reshape":
            continue
        target, output = node.inputs[1], node.outputs[0]
        if target is None or target.const_value is not None:
            continue
        sizes = constant_sizes(output)
        if sizes is not None:
            node.replace_input_with(1, constant(model.graph, np.array(sizes, np.int64)))
            changed = True
    return changed


def cancel_reshapes(model: ir.Model) -> bool:
    """Reshape(Reshape(x)) -> Reshape(x), and a reshape to the shape it came from -> x."""
    changed = False
    for node in model.graph:
        if node.op_type != "Reshape":
            continue
        source = node.inputs[0]
        assert source is not None
        if _same_shape(source, node.outputs[0]):
            _replace(model, node.outputs[0], source)
            changed = True
            continue
        producer = source.producer()
        sizes = constant_sizes(node.outputs[0])
        if producer is not None and producer.op_type == "Reshape" and sizes is not None:
            node.replace_input_with(0, producer.inputs[0])
            node.replace_input_with(1, constant(model.graph, np.array(sizes, np.int64)))
            changed = True
    return changed


def cancel_transposes(model: ir.Model) -> bool:
    """Transpose(Transpose(x)) -> one Transpose, or x where they cancel."""
    changed = False
    for node in model.graph:
        producer = _producer(node, "Transpose") if node.op_type == "Transpose" else None
        if producer is None:
            continue
        inner, outer = producer.attributes["perm"].as_ints(), node.attributes["perm"].as_ints()
        combined = [inner[axis] for axis in outer]
        source = producer.inputs[0]
        assert source is not None
        if combined == list(range(len(combined))):
            _replace(model, node.outputs[0], source)
        else:
            node.replace_input_with(0, source)
            node.attributes["perm"] = ir.AttrInt64s("perm", combined)
        changed = True
    return changed


def remove_identities(model: ir.Model) -> bool:
    """Drop Identity nodes, casts to the type a value already has, and products with one."""
    changed = False
    for node in model.graph:
        source = node.inputs[0] if node.inputs else None
        if source is None or not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            continue
        cast = node.op_type == "Cast" and source.dtype is not None and node.attributes["to"].as_int() == source.dtype
        if (node.op_type == "Identity" and not node.outputs[0].is_graph_output()) or cast:
            _replace(model, node.outputs[0], source)
            changed = True
    return changed


def constant_sizes(value: ir.Value) -> list[int] | None:
    """A value's shape as a Reshape target, -1 for its only dynamic axis; None if it has several."""
    if value.shape is None:
        return None
    sizes = [dim if isinstance(dim, int) else -1 for dim in value.shape]
    return sizes if sizes.count(-1) <= 1 else None


def constant(graph: ir.Graph, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ir.Value:
    """An initializer holding ``array``; equal small ones are shared by :func:`share_equal_nodes`."""
    index = len(graph.initializers)
    while (name := f"constant_{index}") in graph.initializers:
        index += 1
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), value.const_value.dtype if value.const_value else None
    graph.register_initializer(value)
    return value


def _producer(node: ir.Node, op_type: str) -> ir.Node | None:
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    return producer if producer is not None and producer.op_type == op_type else None


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    return a.shape is not None and a.shape == b.shape and not any(dim.value is None for dim in _dynamic(a))


def _dynamic(value: ir.Value) -> list[ir.SymbolicDim]:
    assert value.shape is not None
    return [dim for dim in value.shape if isinstance(dim, ir.SymbolicDim)]


def _replace(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    """Let every user of ``old`` use ``new``; an output of the graph keeps its name through an Identity."""
    if old.is_graph_output():
        node = old.producer()
        assert node is not None
        node.op_type, node.domain = "Identity", ""
        node.attributes.clear()
        for index in reversed(range(1, len(node.inputs))):
            node.replace_input_with(index, None)
        node.resize_inputs(1)
        node.replace_input_with(0, new)
        users = [usage for usage in old.uses()]
        for user, index in users:
            user.replace_input_with(index, new)
        return
    old.replace_all_uses_with(new)
    del model
