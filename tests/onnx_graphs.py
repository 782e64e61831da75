"""Small graphs for the exporter's tests: the classifier with each pooling, parsing text, running graphs."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import torch
from goldens import generated_weights, standard_normal

from admtrt.config import ClassifierConfig
from admtrt.contract import classifier_gradient_spec
from admtrt.export.capture import graph_from_module
from admtrt.export.differentiate import ConvBackward, add_input_gradient
from admtrt.export.graphs import example_inputs
from admtrt.export.passes import simplify
from admtrt.models.classifier import Classifier, log_prob

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
CLASSES = 5


class LogProb(torch.nn.Module):
    def __init__(self, classifier: torch.nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return log_prob(self.classifier, x, t, y)


class Function(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


@cache
def small_classifier(pool: str) -> Classifier:
    """Two levels, residual up- and downsampling, attention at 4x4; no layer is zero. Do not change it."""
    config = ClassifierConfig(
        image_size=8,
        model_channels=32,
        num_res_blocks=1,
        channel_mult=(1, 2),
        attention_resolutions=(4,),
        num_head_channels=16,
        num_classes=CLASSES,
        pool=pool,
    )
    return generated_weights(Classifier(config))


@cache
def _forward_bytes(pool: str) -> bytes:
    classifier = small_classifier(pool)
    inputs = example_inputs(classifier_gradient_spec(classifier.config))
    return proto(graph_from_module(LogProb(classifier).eval(), inputs, ["log_prob"])).SerializeToString()


def forward_graph(pool: str) -> ir.Model:
    """A fresh copy of log p(y | x_t, t) as a graph; captured once for each pooling."""
    return ir.serde.deserialize_model(onnx.load_from_string(_forward_bytes(pool)))


def fresh_gradient(pool: str, conv_backward: ConvBackward = "flipped") -> onnx.ModelProto:
    """A new gradient graph, by the current rules."""
    model = forward_graph(pool)
    add_input_gradient(model, wrt="x", of="log_prob", name="grad", conv_backward=conv_backward)
    return proto(model)


@cache
def gradient_graph(pool: str, conv_backward: ConvBackward = "flipped") -> onnx.ModelProto:
    """The gradient graph. It is made once: edit only copies."""
    return fresh_gradient(pool, conv_backward)


def batch_of(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, t and y of up to five samples for the small classifiers."""
    x = torch.from_numpy(standard_normal(f"hazards.x{size}", (size, 3, 8, 8)))
    t = torch.tensor([37.0, 999.0, 0.0, 412.5, 730.0])[:size]
    return x, t, torch.tensor([3, 0, 4, 1, 2])[:size]


def proto(model: ir.Model) -> onnx.ModelProto:
    return ir.serde.serialize_model(model)


def parse(text: str, constants: Mapping[str, Any] | None = None, *, opset: int = 18) -> onnx.ModelProto:
    """A graph in ONNX's text form, ``name (inputs) => (outputs) { nodes }``, with named constants."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> {text}')
    for name, values in (constants or {}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return model


def differentiated(
    model: onnx.ModelProto, *, of: str = "value", conv_backward: ConvBackward = "flipped"
) -> onnx.ModelProto:
    """Add d sum(``of``) / dx as ``grad`` and check the result."""
    graph = ir.serde.deserialize_model(model)
    simplify(graph)
    add_input_gradient(graph, wrt="x", of=of, name="grad", conv_backward=conv_backward)
    result = proto(graph)
    onnx.checker.check_model(result, full_check=True)
    return result


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto | ort.InferenceSession, **feeds: Any) -> dict[str, np.ndarray]:
    """Run a graph and return its outputs by name; if it cannot run at these sizes, an assertion fails."""
    try:
        opened = session(model) if isinstance(model, onnx.ModelProto) else model
        values = opened.run(None, {name: np.asarray(value) for name, value in feeds.items()})
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise AssertionError(f"the graph does not run: {error}") from error
    return dict(zip([output.name for output in opened.get_outputs()], values, strict=True))


def op_types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]
