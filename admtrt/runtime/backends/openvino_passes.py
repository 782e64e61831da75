"""What is changed in a graph before OpenVINO compiles it, each pass for one habit of the library."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

EMBEDDING = "time_embedding"
"""The input that :func:`cut_embedding` makes."""

_MANY_POSITIONS = 256
"""From here on a group norm in another layout than the convolutions' costs more than the small operators
around its statistics (measured on the ImageNet-64 configuration)."""


def separate_weights(model: Any) -> None:
    """Give every transposed convolution weights of its own.

    OpenVINO 2026.4 repacks a constant for the one kind of convolution and reads it so for the other, too:
    values are wrong where a gradient shares a forward convolution's weights.
    """
    from openvino import opset1 as ops

    for node in model.get_ordered_ops():
        if node.get_type_name() in ("ConvolutionBackpropData", "GroupConvolutionBackpropData"):
            source = node.input_value(1)
            if source.get_node().get_type_name() == "Constant" and len(source.get_target_inputs()) > 1:
                copied = ops.constant(source.get_node().data.copy())
                node.input(1).replace_source_output(copied.output(0))


def cut_embedding(model: Any) -> Any | None:
    """Take the embedding of ``t``, which ends at the first product, out of a model; None where it has none.

    The model keeps the embedding's values as an input.
    """
    from openvino import Model
    from openvino.opset1 import parameter

    timestep = next((node for node in model.get_parameters() if node.get_friendly_name() == "t"), None)
    ends = [] if timestep is None else _first_products(timestep)
    if not ends:
        return None
    source = ends[0].get_source_output()
    assert all(end.get_source_output() == source for end in ends)  # one embedding, whatever is made of it
    given = parameter(source.get_shape(), source.get_element_type(), name=EMBEDDING)
    given.output(0).get_tensor().set_names({EMBEDDING})
    for end in ends:
        end.replace_source_output(given.output(0))
    model.add_parameters([given])
    model.remove_parameter(timestep)
    return Model([source], [timestep], "embedding")


def _first_products(node: Any) -> list[Any]:
    """The inputs of matrix products that are reached from a node through other operators."""
    found: dict[Any, Any] = {}
    for output in node.outputs():
        for target in output.get_target_inputs():
            user = target.get_node()
            further = [target] if user.get_type_name() == "MatMul" else _first_products(user)
            found |= {(end.get_node().get_friendly_name(), end.get_index()): end for end in further}
    return list(found.values())


def normalise_by_channel(model: Any) -> int:
    """Let the group norms of large images keep the layout of the convolutions; returns how many were changed.

    A convolution here wants its channels last, an MVN over [N, groups, rest] wants them first: the image is
    copied before and behind it. Means over the positions of one channel run in any layout, and a group's
    statistics follow from its channels': its mean is the mean of their means, its variance the mean of their
    variances plus the variance of their means. Nothing cancels, so float32 stays exact. Left alone is a norm
    whose normalised groups the graph reads otherwise, as a gradient graph does.

    Args:
        model: with all sizes fixed.
    """
    from openvino import opset6 as ops

    def mean(value: Any, *axes: int) -> Any:
        return ops.reduce_mean(value, ops.constant(axes, np.int64), True)

    def shaped(value: Any, *sizes: int) -> Any:
        return ops.reshape(value, ops.constant(sizes, np.int64), False)

    changed = 0
    for node in model.get_ordered_ops():
        norm = _group_norm(node)
        if norm is None:
            continue
        batch, channels, height, width = norm.x.get_shape()
        if height * width < _MANY_POSITIONS:
            continue
        by_group, by_channel = (batch, norm.groups, channels // norm.groups), (batch, channels, 1, 1)
        means = mean(norm.x, 2, 3)
        centered = ops.subtract(norm.x, means)
        variances = shaped(mean(ops.multiply(centered, centered), 2, 3), *by_group)
        of_channels = shaped(means, *by_group)
        offsets = ops.subtract(of_channels, mean(of_channels, 2))
        variance = mean(ops.add(variances, ops.multiply(offsets, offsets)), 2)
        std = ops.sqrt(ops.add(variance, ops.constant(norm.epsilon, np.float32)))
        ones = ops.constant(np.ones(by_group[2], np.float32))
        scale = ops.multiply(ops.divide(norm.scale, std), ones)
        shift = ops.add(ops.multiply(offsets, scale), norm.bias)
        normalised = ops.multiply(centered, shaped(scale, *by_channel))
        norm.result.replace(ops.add(normalised, shaped(shift, *by_channel)).output(0))
        changed += 1
    return changed


class _GroupNorm(NamedTuple):
    """Reshape - MVN - Multiply - Add - Reshape; x and the result are [N, C, H, W], the factors [1, G, 1]."""

    x: Any
    result: Any
    groups: int
    scale: Any
    bias: Any
    epsilon: float


def _group_norm(node: Any) -> _GroupNorm | None:
    """The group norm around a node that is its MVN."""
    from openvino import Type

    if node.get_type_name() != "MVN":
        return None
    split = node.input_value(0).get_node()
    product = _only_reader(node, "Multiply")
    total = _only_reader(product, "Add")
    merge = _only_reader(total, "Reshape")
    if split.get_type_name() != "Reshape" or product is None or total is None or merge is None:
        return None
    x, result = split.input_value(0), merge.output(0)
    if len(x.get_shape()) != 4 or x.get_shape() != result.get_shape() or x.get_element_type() != Type.f32:
        return None
    groups, epsilon = node.get_output_shape(0)[1], node.get_attributes()["eps"]
    return _GroupNorm(x, result, groups, product.input_value(1), total.input_value(1), epsilon)


def _only_reader(node: Any | None, kind: str) -> Any | None:
    """The one node that reads another's values, if there is one only and it is of this kind."""
    readers = [] if node is None else [target.get_node() for target in node.output(0).get_target_inputs()]
    readers = [reader for reader in readers if reader.get_type_name() != "ShapeOf"]
    return readers[0] if len(readers) == 1 and readers[0].get_type_name() == kind else None
