"""The graphs of guides: a UNet, a loss of its x_0, and the gradient through both."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor, nn

from admtrt.contract import GUIDE_CLIP, X0_WEIGHTS, event_shape, guide_spec, unet_spec
from admtrt.export.capture import graph_from_module
from admtrt.export.differentiate import add_input_gradient
from admtrt.export.graphs import example_inputs, unet_graph
from admtrt.export.guides.guide import STATE_INPUT, Guide
from admtrt.export.nodes import LOSS
from admtrt.export.passes import simplify
from admtrt.export.tape import ConvBackward, Tape

if TYPE_CHECKING:
    from admtrt.config import UNetConfig
    from admtrt.export.guides.guide import AnyGuide
    from admtrt.models.unet import UNet

_TINY = 1e-20  # avoids a division by 0; smaller root mean squares underflow in float32


class GuidedUNet(nn.Module):
    """The UNet's output, - loss of each sample and, unless ``boost`` is 1, - loss times ``boost``.

    Takes the graph's inputs in order.

    Args:
        unet: called with x, t and its conditions by name.
        config: configuration of the UNet.
        guide: guide with the loss.
        boost: see :func:`guide_graph`.
    """

    def __init__(self, unet: nn.Module, config: UNetConfig, guide: Guide, boost: float = 1.0) -> None:
        super().__init__()
        self.unet = unet
        self.loss = guide.loss
        self.boost = boost
        self.parameter_names = guide.parameters[1:]
        self.names = [tensor.name for tensor in guide_spec(config, guide.config).inputs]
        self.conditions = [one.name for one in unet_spec(config).inputs if one.name not in ("x", "t")]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        given = dict(zip(self.names, tensors, strict=True))
        conditions = {name: given[name] for name in self.conditions}
        out: Tensor = self.unet(given["x"], given["t"], **conditions)
        from_x, from_out, clip = (given[name][:, None, None, None] for name in (*X0_WEIGHTS, GUIDE_CLIP))
        x0 = torch.clamp(from_x * given["x"] + from_out * out[:, : given["x"].shape[1]], -clip, clip)
        given[STATE_INPUT] = given["x"]
        value = -self.loss(x0, *(given[name] for name in self.parameter_names))
        return (out, value) if self.boost == 1 else (out, value, value * self.boost)


class NoisyLoss(nn.Module):
    """- loss of the state and, unless ``boost`` is 1, that times ``boost``. Takes the graph's inputs."""

    def __init__(self, guide: Guide, boost: float = 1.0) -> None:
        super().__init__()
        self.loss = guide.loss
        self.boost = boost

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...] | Tensor:
        """See the class."""
        value = -self.loss(*tensors)
        return value if self.boost == 1 else (value, value * self.boost)


def guide_graph(
    unet: UNet, guide: AnyGuide, *, conv_backward: ConvBackward = "flipped", boosted: bool = False
) -> ir.Model:
    """The graph of a guide, with the types and names of :func:`admtrt.contract.guide_spec`.

    Args:
        unet: the bundle's UNet.
        guide: a guide that has a graph of its own.
        conv_backward: see :data:`~admtrt.export.tape.ConvBackward`.
        boosted: start the backward pass from sqrt(CHW) times the loss, and divide at the end, so that the
            gradient of a norm stays within the range of fp16.
    """
    if not isinstance(guide, Guide):
        assert guide.network is not None  # otherwise it would reuse the UNet's graph
        return unet_graph(guide.network)
    event = event_shape(unet.config)
    boost = math.sqrt(math.prod(event)) if boosted else 1.0
    module = (
        GuidedUNet(unet, unet.config, guide, boost) if guide.through == "unet" else NoisyLoss(guide, boost)
    )
    spec = guide_spec(unet.config, guide.config)
    outputs = [tensor.name for tensor in spec.outputs if tensor.name != "grad"]
    inputs = example_inputs(spec)
    model = graph_from_module(module.eval(), inputs, outputs if boost == 1 else [*outputs, "boosted"])
    _mark_loss(model)
    of = "value" if boost == 1 else "boosted"
    add_input_gradient(model, wrt="x", of=of, name="grad", conv_backward=conv_backward)
    tape = Tape(model.graph, conv_backward=conv_backward)
    if boost != 1:
        model.graph.outputs.pop()
        grad = model.graph.outputs[0]
        _replace_gradient(model, tape.op("Mul", grad, tape.scalar(1 / boost, grad)))
    if guide.normalise != "none":
        _normalise(model, tape, guide.config.normalise, event)
    simplify(model)
    return model


def _mark_loss(model: ir.Model) -> None:
    """Mark every node after the UNet as part of the loss. Its backward inherits the mark."""
    behind = {value for value in model.graph.outputs if value.name == "out"}
    for node in model.graph:
        if not behind.isdisjoint(node.inputs):
            behind.update(node.outputs)
            node.metadata_props[LOSS] = "1"


def _normalise(model: ir.Model, tape: Tape, how: str, event: tuple[int, ...]) -> None:
    """Scale the gradient of each sample by its root mean square."""
    grad = model.graph.outputs[0]
    rms = _root_mean_square(tape, grad)
    safe = tape.op("Max", rms, tape.scalar(_TINY, grad))
    kind, _, number = how.partition(":")
    if kind == "unit":
        factor = tape.op("Div", tape.scalar(1 / math.sqrt(math.prod(event)), grad), safe)
    elif kind == "cap":
        factor = tape.op("Div", tape.op("Min", rms, tape.scalar(float(number), grad)), safe)
    else:
        out = next(value for value in model.graph.outputs if value.name == "out")
        ends = (tape.ints(0), tape.ints(event[0]), tape.ints(1))
        factor = tape.op("Div", _root_mean_square(tape, tape.op("Slice", out, *ends)), safe)
    _replace_gradient(model, tape.op("Mul", grad, factor))


def _root_mean_square(tape: Tape, value: ir.Value) -> ir.Value:
    mean = tape.op("ReduceMean", tape.op("Mul", value, value), tape.ints(1, 2, 3), keepdims=1)
    return tape.op("Sqrt", mean)


def _replace_gradient(model: ir.Model, made: ir.Value) -> None:
    grad = model.graph.outputs[0]
    made.name, made.shape, made.type = "grad", grad.shape, grad.type
    grad.name = "grad_as_it_is"
    model.graph.outputs[0] = made
