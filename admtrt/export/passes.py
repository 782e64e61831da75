"""Small graph passes. Each makes one kind of change in place and returns whether it changed anything."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    DeduplicateInitializersPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
    TopologicalSortPass,
)

from admtrt.export.nodes import ints_attribute

if TYPE_CHECKING:
    from collections.abc import Sequence


def simplify(model: ir.Model) -> None:
    """Run every pass that a freshly captured or differentiated graph needs, until nothing changes."""
    infer_shapes(model)
    changed = True
    while changed:
        changed = False
        for one in (
            stable_log_sigmoid,
            unsqueeze_constants,
            merge_unsqueezes,
            merge_transposes,
            drop_whole_slices,
            static_reshapes,
            merge_reshapes,
            join_before_reshaping,
            share_equal_constants,
            remove_unused,
        ):
            changed |= one(model)
    TopologicalSortPass()(model)
    infer_shapes(model)


def infer_shapes(model: ir.Model) -> None:
    """Infer types and shapes where possible. A missing shape is reported by the code that needs it."""
    logger = logging.getLogger("onnx_ir")  # would print its own traceback
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        ShapeInferencePass(check_type=True, data_prop=True)(model)
    finally:
        logger.setLevel(level)


def remove_unused(model: ir.Model) -> bool:
    """Drop nodes and initializers that reach no output."""
    return bool(RemoveUnusedNodesPass()(model).modified)


def share_equal_constants(model: ir.Model) -> bool:
    """Deduplicate small constants. Large weights are never equal, so they are not hashed."""
    return bool(DeduplicateInitializersPass(size_limit=1024)(model).modified)


def unsqueeze_constants(model: ir.Model) -> bool:
    """Unsqueeze of a constant -> a constant with more axes of size 1, sharing the values."""
    changed = False
    for node in model.graph:
        values = [value.const_value if value is not None else None for value in node.inputs]
        if node.op_type != "Unsqueeze" or values[0] is None or values[1] is None:
            continue
        array = values[0].numpy()
        rank = array.ndim + values[1].size
        axes = tuple(int(axis) % rank for axis in values[1].numpy())
        node.outputs[0].replace_all_uses_with(constant(model.graph, np.expand_dims(array, axes)))
        changed = True
    return changed


def merge_unsqueezes(model: ir.Model) -> bool:
    """Unsqueeze(Unsqueeze(x)) -> Unsqueeze(x)."""
    changed = False
    for node in model.graph:
        inner = _first_input_from(node, "Unsqueeze")
        if inner is None or node.outputs[0].shape is None or inner.outputs[0].shape is None:
            continue
        axes = [_constant_ints(one.inputs[1]) for one in (node, inner)]
        if axes[0] is None or axes[1] is None:
            continue
        rank, inner_rank = len(node.outputs[0].shape), len(inner.outputs[0].shape)
        added = {axis % rank for axis in axes[0]}
        places = [axis for axis in range(rank) if axis not in added]  # of the inner result
        every = sorted([*added, *(places[axis % inner_rank] for axis in axes[1])])
        node.replace_input_with(0, inner.inputs[0])
        node.replace_input_with(1, constant(model.graph, np.array(every, np.int64)))
        changed = True
    return changed


def merge_transposes(model: ir.Model) -> bool:
    """Transpose(Transpose(x)) -> Transpose(x), or x if they cancel."""
    changed = False
    for node in model.graph:
        inner = _first_input_from(node, "Transpose")
        if inner is None or node.outputs[0].shape is None or inner.inputs[0] is None:
            continue
        backwards = range(len(node.outputs[0].shape) - 1, -1, -1)
        first, second = (ints_attribute(one, "perm", backwards) for one in (inner, node))
        perm = [first[axis] for axis in second]
        if perm == sorted(perm):
            changed |= pass_by(node.outputs[0], inner.inputs[0])
            continue
        node.replace_input_with(0, inner.inputs[0])
        node.attributes["perm"] = ir.AttrInt64s("perm", perm)
        changed = True
    return changed


def drop_whole_slices(model: ir.Model) -> bool:
    """Slice that takes all of its input -> the input."""
    changed = False
    for node in model.graph:
        source = node.inputs[0] if node.op_type == "Slice" else None
        if source is None or source.shape is None or source.shape != node.outputs[0].shape:
            continue
        steps = [1] if len(node.inputs) < 5 else _constant_ints(node.inputs[4])
        named = all(isinstance(size, int) or size.value is not None for size in source.shape)
        if named and steps is not None and set(steps) <= {1}:
            changed |= pass_by(node.outputs[0], source)
    return changed


def _first_input_from(node: ir.Node, op_type: str) -> ir.Node | None:
    """The producer of a node's first input, if it is of the same kind."""
    producer = node.inputs[0].producer() if node.op_type == op_type and node.inputs[0] is not None else None
    return producer if producer is not None and producer.op_type == op_type else None


def _constant_ints(value: ir.Value | None) -> list[int] | None:
    if value is None or value.const_value is None:
        return None
    return [int(number) for number in value.const_value.numpy().ravel()]


def free_name(graph: ir.Graph, name: str) -> str:
    """Free a name: rename inner values that have it. Inputs and outputs keep their names."""
    values = {value.name: value for node in graph for value in node.outputs} | dict(graph.initializers)
    inner = values.get(name)
    if inner is not None and not inner.is_graph_output():
        other = f"inner_{name}"
        while other in values:
            other = f"inner_{other}"
        inner.name = other
    return name


def pass_by(value: ir.Value, source: ir.Value) -> bool:
    """Let the readers of a value read another one. Graph outputs are not changed."""
    if value.is_graph_output() or not value.uses():
        return False
    value.replace_all_uses_with(source)
    return True


def stable_log_sigmoid(model: ir.Model) -> bool:
    """Log(Sigmoid(x)) -> -Softplus(-x): finite and differentiable even if the sigmoid underflows to 0."""
    changed = False
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Log" else None
        sigmoid = None if source is None else source.producer()
        if sigmoid is None or sigmoid.op_type != "Sigmoid":
            continue
        tape = ir.tape.Tape()
        tape.op("Neg", [tape.op("Softplus", [tape.op("Neg", [sigmoid.inputs[0]])])])
        for made in tape.nodes:
            made.outputs[0].shape, made.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        insert_in_place_of(model.graph, node, tape.nodes, node.outputs[0])
        changed = True
    return changed


def static_reshapes(model: ir.Model) -> bool:
    """Replace a Reshape's computed target by a constant if at most one size is dynamic."""
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


def merge_reshapes(model: ir.Model) -> bool:
    """Reshape(Reshape(x)) -> Reshape(x)."""
    changed = False
    for node in model.graph:
        source = node.inputs[0] if node.op_type == "Reshape" else None
        producer = None if source is None else source.producer()
        sizes = constant_sizes(node.outputs[0])
        if producer is not None and producer.op_type == "Reshape" and sizes is not None:
            node.replace_input_with(0, producer.inputs[0])
            node.replace_input_with(1, constant(model.graph, np.array(sizes, np.int64)))
            changed = True
    return changed


def join_before_reshaping(model: ir.Model) -> bool:
    """Concat(Reshape(a), Reshape(b)) -> Reshape(Concat(a, b)), if each merges the same two axes.

    This joins the gradients of queries, keys and values by heads instead of by channels.
    """
    changed = False
    for node in list(model.graph):
        sizes = constant_sizes(node.outputs[0]) if node.op_type == "Concat" else None
        if sizes is None or len(node.inputs) < 2:
            continue
        axis = node.attributes["axis"].as_int() % len(sizes)
        sources = [_merged_at(value, axis) for value in node.inputs]
        inner = {None if source is None else _sizes_of(source)[axis + 1] for source in sources}
        if axis == 0 or len(inner) != 1 or None in inner:
            continue
        tape = ir.tape.Tape()
        joined = tape.op("Concat", sources, attributes={"axis": axis})
        target = constant(model.graph, np.array(sizes, np.int64))
        tape.op("Reshape", [joined, target])
        first = sources[0]
        assert first is not None
        shape = _sizes_of(first)
        shape[axis] = sum(_sizes_of(source)[axis] or 0 for source in sources if source is not None)
        joined.shape, joined.type = ir.Shape(shape), first.type
        for made in tape.nodes:
            made.metadata_props.update(node.metadata_props)
        insert_in_place_of(model.graph, node, tape.nodes, node.outputs[0])
        changed = True
    return changed


def _merged_at(value: ir.Value | None, axis: int) -> ir.Value | None:
    """The source of a Reshape that merges ``axis`` and the next, if it has one reader."""
    producer = None if value is None else value.producer()
    if value is None or producer is None or producer.op_type != "Reshape":
        return None
    source = producer.inputs[0]
    if source is None or source.shape is None or value.shape is None or len(list(value.uses())) != 1:
        return None
    before, after = _sizes_of(source), _sizes_of(value)
    if len(before) != len(after) + 1 or value.is_graph_output():
        return None
    first, second, merged = before[axis], before[axis + 1], after[axis]
    apart = before[:axis] + before[axis + 2 :]
    whole = after[:axis] + after[axis + 1 :]
    if first is None or second is None or first * second != merged or apart != whole:
        return None
    # A single unknown size is the same in both shapes, since all other sizes are equal.
    return source if apart.count(None) <= 1 else None


def _sizes_of(value: ir.Value) -> list[int | None]:
    assert value.shape is not None
    return [dim if isinstance(dim, int) else None for dim in value.shape]


def constant_sizes(value: ir.Value) -> list[int] | None:
    """A value's shape as a Reshape target, -1 for its only dynamic axis; None if it has several."""
    if value.shape is None:
        return None
    sizes = [dim if isinstance(dim, int) else -1 for dim in value.shape]
    return sizes if sizes.count(-1) <= 1 else None


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The only reader of a value, if there is exactly one and it is of this kind."""
    users = list(value.uses())
    if value.is_graph_output() or len(users) != 1 or users[0].node.op_type != op_type:
        return None
    return users[0].node


def insert_in_place_of(graph: ir.Graph, place: ir.Node, nodes: Sequence[ir.Node], result: ir.Value) -> None:
    """Insert nodes; the last one's output replaces ``result``."""
    graph.insert_after(place, nodes)
    made = nodes[-1].outputs[0]
    made.shape, made.type = result.shape, result.type
    result.replace_all_uses_with(made, replace_graph_outputs=True)
    if made.is_graph_output():
        made.name, result.name = result.name, f"{result.name}_replaced"  # now unused, but it must have a name


def constant(graph: ir.Graph, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ir.Value:
    """An initializer holding ``array``; equal small ones are shared by :func:`share_equal_constants`."""
    index = len(graph.initializers)
    while (name := f"constant_{index}") in graph.initializers:
        index += 1
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value
