"""The peer ``plain-onnx``: the networks exported by PyTorch alone, on ONNX Runtime.

The gradient is exported the way that a user without admtrt could: ``make_fx`` over ``torch.func.vjp``, with
decompositions of operators that the exporter does not know. Batch sizes are fixed.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from admtrt.contract import GraphName, classifier_gradient_spec, is_network, unet_spec
from admtrt.export.graphs import PositionalUNet, example_inputs
from admtrt.runtime.backends.graphs import GraphDenoiser
from admtrt.runtime.backends.onnxruntime import import_onnxruntime

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from admtrt.bench.subject import Subject
    from admtrt.bundle import Bundle
    from admtrt.contract import GraphSpec
    from admtrt.models.classifier import Classifier
    from admtrt.runtime.slots import Array


@dataclass(frozen=True)
class PlainExport:
    """Files and node counts of the graphs by name, and the seconds of their export."""

    paths: Mapping[GraphName, Path]
    nodes: Mapping[GraphName, int]
    seconds: float


def export_plain(subject: Subject, batch: int) -> PlainExport:
    """Export both networks at a fixed batch size by PyTorch alone.

    Raises:
        Exception: whatever PyTorch raises if the export fails.
    """
    began = time.perf_counter()
    unet, classifier = subject.networks()
    folder = subject.scratch / f"plain-{batch}"
    folder.mkdir(parents=True, exist_ok=True)
    programs: dict[GraphName, Any] = {
        "unet": _program(PositionalUNet(unet).eval(), unet_spec(unet.config), batch)
    }
    if classifier is not None:
        gradient = classifier_gradient_spec(classifier.config)
        traced = traced_gradient(classifier, tuple(example_inputs(gradient, batch).values()))
        programs["classifier_gradient"] = _program(traced, gradient, batch)
    for name, program in programs.items():
        program.save(folder / f"{name}.onnx", external_data=True)
    return PlainExport(
        paths={name: folder / f"{name}.onnx" for name in programs},
        nodes={name: len(list(program.model.graph)) for name, program in programs.items()},
        seconds=time.perf_counter() - began,
    )


class PlainDenoiser(GraphDenoiser):
    """Networks exported by PyTorch, run with ONNX Runtime's defaults; the small graphs are the bundle's.

    Args:
        bundle: the bundle with the small graphs.
        exported: the exported graphs.
        threads: threads per operator.
    """

    def __init__(self, bundle: Bundle, exported: PlainExport, threads: int) -> None:
        onnxruntime = import_onnxruntime(extra="cpu", purpose="The row plain-onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        small: dict[GraphName, Path] = {
            name: bundle.graph_path(name) for name in bundle.manifest.sampled_graphs if not is_network(name)
        }
        paths = {**small, **exported.paths}
        self.specs = {name: bundle.graph_entry(name).spec for name in paths}
        if "classifier_gradient" in paths:  # this export has no log_prob
            spec = self.specs["classifier_gradient"]
            self.specs["classifier_gradient"] = spec.model_copy(update={"outputs": spec.outputs[:1]})
        self._sessions: dict[GraphName, Any] = {
            name: onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            for name, path in paths.items()
        }

    def _run(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        names = [tensor.name for tensor in self.specs[graph].outputs]
        return dict(zip(names, self._sessions[graph].run(None, feeds), strict=True))


def _program(module: nn.Module, spec: GraphSpec, batch: int) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            module,
            tuple(example_inputs(spec, batch).values()),
            dynamo=True,
            input_names=[tensor.name for tensor in spec.inputs],
            verbose=False,
        )


def traced_gradient(classifier: Classifier, examples: tuple[Tensor, ...]) -> nn.Module:
    """Trace the operators that autograd runs for d log p(y | x_t) / dx_t to a module."""
    from torch._decomp import core_aten_decompositions  # noqa: PLC2701 - it has no public name
    from torch.fx.experimental.proxy_tensor import make_fx

    def gradient(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        def log_prob(x: Tensor) -> Tensor:
            return torch.log_softmax(classifier(x, t), dim=-1).gather(1, y[:, None]).sum()

        value, pull, *_ = torch.func.vjp(log_prob, x)
        grad: Tensor = pull(torch.ones_like(value))[0]
        return grad

    aten = torch.ops.aten
    table: dict[Any, Any] = {**core_aten_decompositions()}
    table[aten.convolution_backward.default] = convolution_backward
    table[aten.avg_pool2d_backward.default] = _average_pool_backward
    table[aten.empty_permuted.default] = _empty_permuted
    return make_fx(gradient, decomposition_table=table)(*examples)


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, _bias: Any, *options: Any
) -> tuple[Tensor, None, None]:
    """The input gradient of a convolution: a transposed convolution."""
    stride, padding, dilation, _transposed, _output_padding, groups, _mask = options
    reached = [
        (size - 1) * s - 2 * p + d * (kernel - 1) + 1
        for size, s, p, d, kernel in zip(
            grad.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    missing = [size - got for size, got in zip(x.shape[2:], reached, strict=True)]
    made = torch.ops.aten.convolution.default(
        grad, weight, None, stride, padding, dilation, True, missing, groups
    )
    return made, None, None


def _average_pool_backward(grad: Tensor, _x: Tensor, kernel: list[int], *_options: Any) -> Tensor:
    """The backward of average pooling with non-overlapping windows, the only pooling in these networks."""
    n, c, h, w = grad.shape
    spread = grad[:, :, :, None, :, None].expand(n, c, h, kernel[0], w, kernel[1])
    return spread.reshape(n, c, h * kernel[0], w * kernel[1]) / (kernel[0] * kernel[1])


def _empty_permuted(size: list[int], _order: list[int], **options: Any) -> Tensor:
    return torch.zeros(size, dtype=options["dtype"])
