"""Rewrite a graph before OpenVINO compiles it. Each pass works around one behaviour of the library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

EMBEDDING = "time_embedding"
"""Name of the input that :func:`cut_embedding` adds."""

_MANY_POSITIONS = 256
"""Number of positions from which changing the layout for a group norm costs more than the extra small
operators that avoid it (measured on the ImageNet-64 configuration)."""


def separate_weights(model: Any) -> None:
    """Give every transposed convolution and every matrix product its own copy of the weights.

    OpenVINO 2026.4 repacks a constant for one consumer and lets others read it in that layout: for a
    convolution and a transposed convolution, and for products with a square matrix and with its transpose. A
    gradient that shares the forward's weights is then wrong.
    """
    from openvino import opset1 as ops

    for node in model.get_ordered_ops():
        if node.get_type_name() in ("ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul"):
            for given in node.inputs():
                source = given.get_source_output()
                if source.get_node().get_type_name() == "Constant" and len(source.get_target_inputs()) > 1:
                    copied = ops.constant(source.get_node().data.copy())
                    given.replace_source_output(copied.output(0))


def cut_embedding(model: Any) -> Any | None:
    """Cut the embedding of ``t``, up to the first matrix product, out of a model; None if there is none.

    The model keeps the embedding's values as an input.
    """
    from openvino import Model
    from openvino.opset1 import parameter

    timestep = next((node for node in model.get_parameters() if node.get_friendly_name() == "t"), None)
    ends = [] if timestep is None else _first_products(timestep)
    if not ends:
        return None
    source = ends[0].get_source_output()
    assert all(end.get_source_output() == source for end in ends)  # one embedding, for all layers
    given = parameter(source.get_shape(), source.get_element_type(), name=EMBEDDING)
    given.output(0).get_tensor().set_names({EMBEDDING})
    for end in ends:
        end.replace_source_output(given.output(0))
    model.add_parameters([given])
    model.remove_parameter(timestep)
    return Model([source], [timestep], "embedding")


def _first_products(node: Any) -> list[Any]:
    """The inputs of the first matrix products that a node reaches through other operators."""
    found: dict[Any, Any] = {}
    for output in node.outputs():
        for target in output.get_target_inputs():
            user = target.get_node()
            further = [target] if user.get_type_name() == "MatMul" else _first_products(user)
            found |= {(end.get_node().get_friendly_name(), end.get_index()): end for end in further}
    return list(found.values())


def normalise_by_channel(model: Any) -> int:
    """Keep the convolutions' layout in the group norms of large images and in their gradients.

    OpenVINO's convolutions keep channels last. A computation on [N, groups, rest] needs channels first, so
    the image is copied before and after it. This pass computes the group norm on [N, C, H, W] instead: the
    mean of a group is the mean of its channels' means, and all other operations are elementwise. The variance
    stays the mean of squared distances from the mean, so float32 loses no accuracy.

    Args:
        model: with all sizes fixed.

    Returns:
        The number of images that keep their layout.
    """
    rewriter = _ByChannel()
    return sum(rewriter.visit(node) for node in model.get_ordered_ops())


class _ByChannel:
    """Rewrites values on [N, G, K] as values on [N, C, H, W], node by node; equal values are formed once."""

    def __init__(self) -> None:
        from openvino import opset6

        self._ops = opset6
        self._elementwise = {
            "Add": opset6.add,
            "Subtract": opset6.subtract,
            "Multiply": opset6.multiply,
            "Divide": opset6.divide,
        }
        self._images: dict[str, Any] = {}  # by the name of the node that has the grouped value
        self._made: dict[tuple[str, ...], Any] = {}

    def visit(self, node: Any) -> bool:
        """Process one node, in order. True if it ended a chain and was replaced by the image."""
        kind, inputs = node.get_type_name(), node.input_values()
        images = [self._images.get(value.get_node().get_name()) for value in inputs]
        image = next((image for image in images if image is not None), None)
        if image is None:
            if kind == "Reshape" and _groups_channels(inputs[0], node.output(0)):
                self._images[node.get_name()] = inputs[0]
        elif kind == "Reshape" and image.get_shape() == node.get_output_shape(0):
            node.output(0).replace(image)
            return True
        elif kind == "ReduceMean" and _over_groups(node):
            node.output(0).replace(self._mean(image, node.get_output_shape(0)[1]))
        elif kind == "MVN":
            epsilon = node.get_attributes()["eps"]
            self._images[node.get_name()] = self._normalised(image, node.get_output_shape(0)[1], epsilon)
        elif kind in self._elementwise:
            operands = [
                self._spread(value, image) if own is None else own
                for value, own in zip(inputs, images, strict=True)
            ]
            shapes = {tuple(own.get_shape()) for own in images if own is not None}
            if all(operand is not None for operand in operands) and len(shapes) == 1:
                self._images[node.get_name()] = self._apply(kind, *operands)
        return False

    def _normalised(self, image: Any, groups: int, epsilon: float) -> Any:
        centered = self._apply("Subtract", image, self._spread(self._mean(image, groups), image))
        variance = self._mean(self._apply("Multiply", centered, centered), groups)
        std = self._ops.sqrt(self._ops.add(variance, self._ops.constant(epsilon, np.float32)))
        scale = self._ops.divide(self._ops.constant(1, np.float32), std).output(0)
        return self._apply("Multiply", centered, self._spread(scale, image))

    def _mean(self, image: Any, groups: int) -> Any:
        """The mean of each group, [N, G, 1]."""

        def made() -> Any:
            batch, channels = list(image.get_shape())[:2]
            of_channels = self._ops.reduce_mean(image, self._ops.constant([2, 3], np.int64), True)
            return self._ops.reduce_mean(
                self._shaped(of_channels, batch, groups, channels // groups),
                self._ops.constant([2], np.int64),
                True,
            )

        return self._once(("mean", _name(image), str(groups)), made)

    def _spread(self, value: Any, like: Any) -> Any | None:
        """Turn [N or 1, G, 1] into [N or 1, C, 1, 1]. A single number is kept; None for any other shape."""
        shape, channels = list(value.get_shape()), like.get_shape()[1]
        if np.prod(shape) == 1:
            return value
        if len(shape) != 3 or shape[2] != 1 or channels % shape[1]:
            return None

        def made() -> Any:
            ones = self._ops.constant(np.ones(channels // shape[1], np.float32))
            return self._shaped(self._ops.multiply(value, ones), shape[0], channels, 1, 1)

        return self._once(("spread", _name(value), str(channels)), made)

    def _apply(self, kind: str, left: Any, right: Any) -> Any:
        return self._once((kind, _name(left), _name(right)), lambda: self._elementwise[kind](left, right))

    def _shaped(self, value: Any, *sizes: int) -> Any:
        return self._ops.reshape(value, self._ops.constant(sizes, np.int64), False)

    def _once(self, key: tuple[str, ...], make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make().output(0)
        return self._made[key]


def _groups_channels(image: Any, grouped: Any) -> bool:
    """True for a reshape [N, C, H, W] float32 of a large image -> [N, G, K], groups of whole channels."""
    from openvino import Type

    sizes, groups = list(image.get_shape()), list(grouped.get_shape())
    return (
        len(sizes) == 4
        and len(groups) == 3
        and sizes[0] == groups[0]
        and sizes[1] % groups[1] == 0
        and sizes[2] * sizes[3] >= _MANY_POSITIONS
        and image.get_element_type() == Type.f32
    )


def _over_groups(mean: Any) -> bool:
    """True for a mean of [N, G, K] over K that leaves [N, G, 1]."""
    return list(mean.get_output_shape(0)) == [*list(mean.input_value(0).get_shape())[:2], 1]


def _name(output: Any) -> str:
    return f"{output.get_node().get_name()}:{output.get_index()}"
