"""The public exporter of input gradients, for any module: d scalar(module(inputs)) / d input as ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
from torch import Tensor, nn

from admtrt.contract import BATCH
from admtrt.errors import ExportError
from admtrt.export.autograd import check_against_autograd
from admtrt.export.capture import OPSET, graph_from_module
from admtrt.export.differentiate import add_input_gradient, refuse_unknown
from admtrt.export.tape import ConvBackward
from admtrt.export.write import write_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    ScalarFunction = Callable[..., Tensor]

_OUTPUTS = ("grad", "value")


@dataclass(frozen=True)
class GradientGraph:
    """An exported gradient: its file and the names and shapes of what goes in and out."""

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: int


class _Scalar(nn.Module):
    def __init__(self, module: nn.Module, scalar: ScalarFunction | None) -> None:
        super().__init__()
        self.module = module
        self.scalar = scalar
        self.training = module.training  # it has no mode of its own

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self.module(*inputs)
        return out if self.scalar is None else self.scalar(out, *inputs)


def export_input_gradient(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    path: str | Path,
    *,
    wrt: str = "x",
    scalar: ScalarFunction | None = None,
    conv_backward: ConvBackward = "flipped",
    opset: int = OPSET,
    check: bool = True,
) -> GradientGraph:
    """Export the gradient of a per-sample scalar with respect to one input, for any batch size.

    The graph has the module's inputs, and the outputs ``grad`` (shaped as ``wrt``) and ``value`` [N].
    It is the derivative of what is computed: ``detach()`` and ``no_grad()`` leave no trace in a graph, so
    nothing is held constant by them. Where ONNX Runtime is installed, the written graph is run beside
    autograd on rows near the example, near 0, at 0 and far away before it takes its place, unless a type is
    narrower than float32. At ties and ends it has the gradient of the installed PyTorch.

    Args:
        module: called as ``module(*inputs.values())``; all of it in evaluation mode.
        inputs: example tensors by name, all with the batch as their first axis, of size 2 or more. Their
            values do not matter, but where the module is not defined everywhere the check needs some that are
            in its domain.
        path: file to write; weights of more than 64 MiB go to ``<path>.data``.
        wrt: name of the floating-point input to differentiate.
        scalar: ``scalar(module(*inputs), *inputs)`` -> [N]; None where the module returns [N] itself. Each
            sample's scalar must depend on that sample alone.
        conv_backward: ``flipped`` (fast on CPUs) or ``transposed`` (shares the weights).
        opset: of the default ONNX domain.
        check: compare with autograd; False for a module in which gradients are held back on purpose.

    Raises:
        ExportError: if the module cannot be captured or draws random numbers, the scalar is not [N],
            operators have no gradient rule (the message names them and their modules), or the graph and
            autograd differ.
    """
    if wrt not in inputs:
        raise ExportError(f"there is no input '{wrt}'; the inputs are {list(inputs)}")
    other = next((name for name, value in inputs.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        raise ExportError(
            f"the example input '{other}' is a {type(inputs[other]).__name__}; expected a tensor of PyTorch"
        )
    taken = next((name for name in inputs if name in ("", *_OUTPUTS)), None)
    if taken is not None:
        raise ExportError(f"an input cannot be called {taken!r}", hint="Give it another name.")
    if not inputs[wrt].is_floating_point():
        raise ExportError(f"input '{wrt}' is {inputs[wrt].dtype}; only floating-point inputs have a gradient")
    wrapper = _Scalar(module, scalar)
    model = graph_from_module(wrapper, inputs, ["value"], opset=opset)
    shape = model.graph.outputs[0].shape
    if shape is None or len(shape) != 1 or shape[0] != BATCH:
        refuse_unknown(model)  # of whose results the exporter may not know the shape
        raise ExportError(
            f"the scalar has shape {shape}, expected [{BATCH}]: one number for each sample",
            hint="Pass scalar=..., for instance scalar=lambda out, x: out.sum(dim=1).",
        )
    add_input_gradient(model, wrt=wrt, of="value", name="grad", conv_backward=conv_backward)
    target = Path(path)
    beside_autograd = None
    if check and find_spec("onnxruntime") is not None:
        beside_autograd = partial(check_against_autograd, scalar=wrapper, inputs=inputs, wrt=wrt)
    write_graph(model, target, beside_autograd)
    return GradientGraph(
        path=target,
        inputs=_names(model.graph.inputs),
        outputs=_names(model.graph.outputs),
        nodes=len(list(model.graph)),
    )


def _names(values: Sequence[ir.Value]) -> tuple[str, ...]:
    return tuple(value.name or "" for value in values)
