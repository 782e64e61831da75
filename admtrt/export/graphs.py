"""The graphs of a bundle's networks, with the types and names of :mod:`admtrt.contract`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from admtrt.contract import GraphSpec, classifier_gradient_spec, unet_spec
from admtrt.export.capture import graph_from_module
from admtrt.export.differentiate import add_input_gradient
from admtrt.export.tape import ConvBackward
from admtrt.models.classifier import Classifier, log_prob

if TYPE_CHECKING:
    import onnx_ir as ir

    from admtrt.models.unet import UNet

_DTYPES = {"float32": torch.float32, "int64": torch.int64}
EXAMPLE_BATCH = 7
"""Batch size of the captured example. No network has an axis of this size, so a frozen batch shows."""


def example_inputs(spec: GraphSpec, batch: int = EXAMPLE_BATCH) -> dict[str, Tensor]:
    """Tensors of the contract's shapes and types. Capturing does not depend on their values."""
    return {
        tensor.name: torch.zeros(tensor.sized(batch), dtype=_DTYPES[tensor.dtype]) for tensor in spec.inputs
    }


class PositionalUNet(nn.Module):
    """The UNet with the contract's inputs in order, without those that it does not take."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet
        self.names = [tensor.name for tensor in unet_spec(unet.config).inputs]

    def forward(self, *tensors: Tensor) -> Tensor:
        """The UNet's output."""
        out: Tensor = self.unet(**dict(zip(self.names, tensors, strict=True)))
        return out


class _LogProb(nn.Module):
    """log p(y | x_t, t) of each sample."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return log_prob(self.classifier, x, t, y)


def unet_graph(unet: UNet) -> ir.Model:
    """The graph of a UNet or an upsampler."""
    spec = unet_spec(unet.config)
    return graph_from_module(PositionalUNet(unet).eval(), example_inputs(spec), ["out"])


def unet_vector_jacobian_graph(unet: UNet) -> ir.Model:
    """The graph of the UNet and its vector-Jacobian product with respect to x."""
    spec = unet_spec(unet.config)
    model = graph_from_module(PositionalUNet(unet).eval(), example_inputs(spec), ["out"])
    add_input_gradient(model, wrt="x", of="out", name="grad", cotangent="cotangent")
    return model


def classifier_gradient_graph(classifier: Classifier, *, conv_backward: ConvBackward = "flipped") -> ir.Model:
    """The graph of d log p(y | x_t, t) / dx_t and log p of every sample."""
    spec = classifier_gradient_spec(classifier.config)
    model = graph_from_module(_LogProb(classifier).eval(), example_inputs(spec), ["log_prob"])
    add_input_gradient(model, wrt="x", of="log_prob", name="grad", conv_backward=conv_backward)
    return model
