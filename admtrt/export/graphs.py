"""The three graphs of a bundle, each typed and named as :mod:`admtrt.contract` says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor, nn

from admtrt.contract import BATCH, GraphSpec, classifier_gradient_spec, unet_spec, update_spec
from admtrt.export.capture import OPSET, graph_from_module
from admtrt.export.differentiate import add_input_gradient
from admtrt.export.tape import ConvBackward
from admtrt.models.classifier import Classifier, log_prob
from admtrt.schedule import COEFFICIENTS

if TYPE_CHECKING:
    from admtrt.config import UNetConfig
    from admtrt.models.unet import UNet

_DTYPES = {"float32": torch.float32, "int64": torch.int64}
EXAMPLE_BATCH = 7
"""Batch size of the captured example, which no network has for another size; no graph may remember it."""


def example_inputs(spec: GraphSpec, batch: int = EXAMPLE_BATCH) -> dict[str, Tensor]:
    """Tensors of the contract's shapes and types; capturing reads nothing else of them."""
    return {
        tensor.name: torch.zeros(tensor.sized(batch), dtype=_DTYPES[tensor.dtype]) for tensor in spec.inputs
    }


class PositionalUNet(nn.Module):
    """The UNet with the contract's inputs in order, those that the network lacks left out."""

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
    """The UNet, upsamplers included."""
    spec = unet_spec(unet.config)
    return graph_from_module(PositionalUNet(unet).eval(), example_inputs(spec), ["out"])


def classifier_gradient_graph(classifier: Classifier, *, conv_backward: ConvBackward = "flipped") -> ir.Model:
    """d log p(y | x_t, t) / dx_t and log p of every sample."""
    spec = classifier_gradient_spec(classifier.config)
    model = graph_from_module(_LogProb(classifier).eval(), example_inputs(spec), ["log_prob"])
    add_input_gradient(model, wrt="x", of="log_prob", name="grad", conv_backward=conv_backward)
    return model


def update_graph(config: UNetConfig) -> ir.Model:
    """One sampling step from the network's output: :func:`admtrt.schedule.step_coefficients` as a graph."""
    spec = update_spec(config)
    inputs = [
        ir.Value(
            name=tensor.name,
            shape=ir.Shape([ir.SymbolicDim(BATCH) if size == BATCH else size for size in tensor.shape]),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        for tensor in spec.inputs
    ]
    x, out, grad, noise, coefficients = inputs
    tape = ir.tape.Tape()
    ints = {
        name: tape.initializer(ir.tensor(values, dtype=ir.DataType.INT64, name=name))
        for name, values in (("sizes", [1] * len(COEFFICIENTS)), ("row", [0, len(COEFFICIENTS), 1, 1]))
    }
    half = tape.initializer(ir.tensor(0.5, dtype=ir.DataType.FLOAT, name="half"))
    row = tape.op("Reshape", [coefficients, ints["row"]])
    columns = tape.op_multi_out(
        "Split", [row, ints["sizes"]], attributes={"axis": 1}, num_outputs=len(COEFFICIENTS)
    )
    c = dict(zip(COEFFICIENTS, columns, strict=True))

    def mul(a: ir.Value, b: ir.Value) -> ir.Value:
        return tape.op("Mul", [a, b])

    def add(*terms: ir.Value) -> ir.Value:
        total = terms[0]
        for term in terms[1:]:
            total = tape.op("Add", [total, term])
        return total

    if config.learn_sigma:
        split = tape.initializer(
            ir.tensor([config.in_channels] * 2, dtype=ir.DataType.INT64, name="channels")
        )
        value, v = tape.op_multi_out("Split", [out, split], attributes={"axis": 1}, num_outputs=2)
        log_weight = add(c["log_weight"], mul(c["log_weight_from_v"], v))
    else:
        value, log_weight = out, c["log_weight"]
    unclipped = add(mul(c["x0_from_x"], x), mul(c["x0_from_out"], value))
    x_0 = tape.op("Max", [tape.op("Min", [unclipped, c["clip"]]), tape.op("Neg", [c["clip"]])])
    weight, std = tape.op("Exp", [log_weight]), tape.op("Exp", [mul(half, log_weight)])
    x_prev = add(
        mul(c["prev_from_x0"], x_0),
        mul(c["prev_from_x"], x),
        mul(c["prev_from_out"], value),
        mul(mul(c["guidance"], weight), grad),
        mul(mul(c["noise"], std), noise),
    )
    pred_x0 = add(x_0, mul(c["x0_shift"], grad))
    for made, tensor in zip((x_prev, pred_x0), spec.outputs, strict=True):
        made.name, made.type = tensor.name, ir.TensorType(ir.DataType.FLOAT)
        made.shape = ir.Shape([ir.SymbolicDim(BATCH) if size == BATCH else size for size in tensor.shape])
    graph = ir.Graph(
        inputs,
        [x_prev, pred_x0],
        nodes=tape.nodes,
        initializers=tape.initializers,
        opset_imports={"": OPSET},
        name="update",
    )
    return ir.Model(graph, ir_version=9)
