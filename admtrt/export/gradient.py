"""Public functions that export derivatives of any module: gradients, Jacobian and Hessian products."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor, nn

from admtrt.contract import BATCH
from admtrt.errors import ExportError
from admtrt.export.autograd import Derivative, check_against_autograd
from admtrt.export.capture import OPSET, graph_from_module
from admtrt.export.differentiate import NothingToDifferentiateError, add_input_gradient, refuse_unknown
from admtrt.export.tape import ConvBackward
from admtrt.export.write import write_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    ScalarFunction = Callable[..., Tensor]

_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


@dataclass(frozen=True)
class GradientGraph:
    """An exported derivative: its file, the names of its inputs and outputs, and its number of nodes."""

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: int


class _Outputs(nn.Module):
    """A wrapper that returns a tuple: the scalar if there is a function for it, then the module's results."""

    def __init__(self, module: nn.Module, scalar: ScalarFunction | None, *, alone: bool) -> None:
        super().__init__()
        self.module = module
        self.scalar = scalar
        self.alone = alone and scalar is not None  # no other output is requested
        self.training = module.training  # the wrapper has no mode of its own

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out: Tensor | tuple[Tensor, ...] = self.module(*inputs)
        first = () if self.scalar is None else (self.scalar(out, *inputs),)
        if self.alone:  # the module may then return any type
            return first
        return (*first, *((out,) if isinstance(out, Tensor) else out))


def export_input_gradient(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    path: str | Path,
    *,
    wrt: str = "x",
    scalar: ScalarFunction | None = None,
    further: Sequence[str] = (),
    conv_backward: ConvBackward = "flipped",
    opset: int = OPSET,
    check: bool = True,
) -> GradientGraph:
    """Export the gradient of a per-sample scalar with respect to one input, for any batch size.

    The graph has the module's inputs, and the outputs ``grad`` (shaped as ``wrt``), ``value`` [N] and the
    module's outputs named in ``further``, all from one forward pass.

    ``detach()`` and ``no_grad()`` have no effect: they leave no trace in the captured graph, so no value is
    held constant. If ONNX Runtime is installed and no type is narrower than float32, the written graph is
    compared with autograd on rows near the example, near 0, at 0 and far away, before it is moved to
    ``path``. At ties and ends the gradient is that of the installed PyTorch.

    Args:
        module: called as ``module(*inputs.values())``; every submodule in evaluation mode.
        inputs: example tensors by name, all with the batch as their first axis, of size 2 or more. Only the
            check uses their values: if the module is not defined everywhere, they must be in its domain.
        path: file to write; weights of more than 64 MiB go to ``<path>.data``.
        wrt: name of the floating-point input to differentiate.
        scalar: ``scalar(module(*inputs), *inputs)`` -> [N]; None if the module returns [N] itself, alone or
            before further tensors. Each sample's scalar must depend on that sample alone.
        further: names for the tensors [N, ...] that the module returns, in order: for all of them if
            ``scalar`` is given, otherwise for those after the scalar.
        conv_backward: ``flipped`` (fast on CPUs) or ``transposed`` (shares the weights).
        opset: of the default ONNX domain.
        check: compare with autograd; False for a module that blocks gradients on purpose.

    Raises:
        ExportError: if the module cannot be captured or draws random numbers, the scalar is not [N],
            operators have no gradient rule (the message names them and their modules), or the graph and
            autograd differ.
    """
    derivative = Derivative(wrt, ("value", *further))
    return _export(module, scalar, inputs, path, derivative, conv_backward, opset, check=check)


def export_vector_jacobian(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    path: str | Path,
    *,
    wrt: str = "x",
    outputs: Sequence[str] = ("out",),
    of: str | None = None,
    cotangent: str = "cotangent",
    conv_backward: ConvBackward = "flipped",
    opset: int = OPSET,
    check: bool = True,
) -> GradientGraph:
    """Export the product of a vector and the Jacobian of any output, for any batch size.

    The graph has the module's inputs and ``cotangent``, shaped as the output ``of``. Its outputs are ``grad``
    = d sum(``of`` * ``cotangent``) / d ``wrt`` (shaped as ``wrt``) and the module's outputs. A one-hot
    cotangent gives a row of the Jacobian; noise gives Hutchinson's estimate of its trace.

    Args:
        module: as in :func:`export_input_gradient`; returns a tensor [N, ...] or several.
        inputs: as there.
        path: as there.
        wrt: name of the floating-point input to differentiate.
        outputs: names for all tensors that the module returns, in order.
        of: the output to differentiate; None for the first. Each sample's output must depend on that sample
            alone.
        cotangent: name of the new input.
        conv_backward: as there.
        opset: as there.
        check: as there.

    Raises:
        ExportError: as there.
    """
    if not outputs or (of is not None and of not in outputs):
        raise ExportError(f"there is no output '{of or ''}'; the outputs are {list(outputs)}")
    derivative = Derivative(wrt, tuple(outputs), of or outputs[0], cotangent=cotangent)
    return _export(module, None, inputs, path, derivative, conv_backward, opset, check=check)


def export_hessian_vector(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    path: str | Path,
    *,
    wrt: str = "x",
    scalar: ScalarFunction | None = None,
    further: Sequence[str] = (),
    vector: str = "vector",
    conv_backward: ConvBackward = "flipped",
    opset: int = OPSET,
    check: bool = True,
) -> GradientGraph:
    """Export the product of the Hessian of a per-sample scalar and a vector, for any batch size.

    The graph has the module's inputs and ``vector``, shaped as ``wrt``. Its outputs are ``product`` = H
    ``vector`` (shaped as ``wrt``), ``grad``, ``value`` and those of ``further``. The product is the
    derivative of the gradient graph, in which kinks have no second derivative: that of a ReLU is 0.

    Args:
        module: as in :func:`export_input_gradient`.
        inputs: as there.
        path: as there.
        wrt: name of the floating-point input to differentiate twice.
        scalar: as there.
        further: as there.
        vector: name of the new input.
        conv_backward: as there.
        opset: as there.
        check: as there; the comparison is with autograd's second derivative.

    Raises:
        ExportError: as there, and if the Hessian is 0 everywhere.
    """
    derivative = Derivative(wrt, ("value", *further), vector=vector)
    return _export(module, scalar, inputs, path, derivative, conv_backward, opset, check=check)


def _export(
    module: nn.Module,
    scalar: ScalarFunction | None,
    inputs: Mapping[str, Tensor],
    path: str | Path,
    derivative: Derivative,
    conv_backward: ConvBackward,
    opset: int,
    *,
    check: bool,
) -> GradientGraph:
    _check_inputs(inputs, derivative)
    wrapper = _Outputs(module, scalar, alone=len(derivative.outputs) == 1)
    model = graph_from_module(wrapper, inputs, derivative.outputs, opset=opset)
    _check_outputs(model, derivative)
    examples = dict(inputs)
    if derivative.cotangent is not None:
        of = model.graph.outputs[derivative.outputs.index(derivative.of)]
        examples[derivative.cotangent] = _ones_like(of, len(inputs[derivative.wrt]))
    add = partial(add_input_gradient, model, wrt=derivative.wrt, conv_backward=conv_backward)
    add(of=derivative.of, name="grad", cotangent=derivative.cotangent)
    if derivative.vector is not None:
        examples[derivative.vector] = torch.ones_like(inputs[derivative.wrt])
        try:
            add(of="grad", name="product", cotangent=derivative.vector)
        except NothingToDifferentiateError as error:
            raise ExportError(
                f"the Hessian of the scalar is 0 everywhere: {error.message}",
                hint="ReLU and maxima have slopes but no curvature; SiLU, GELU and Softplus have.",
            ) from None
    target = Path(path)
    beside_autograd = None
    if check and find_spec("onnxruntime") is not None:
        beside_autograd = partial(
            check_against_autograd, module=wrapper, inputs=examples, derivative=derivative
        )
    write_graph(model, target, beside_autograd)
    return GradientGraph(
        path=target,
        inputs=_names(model.graph.inputs),
        outputs=_names(model.graph.outputs),
        nodes=len(list(model.graph)),
    )


def _check_inputs(inputs: Mapping[str, Tensor], derivative: Derivative) -> None:
    wrt = derivative.wrt
    if wrt not in inputs:
        raise ExportError(f"there is no input '{wrt}'; the inputs are {list(inputs)}")
    other = next((name for name, value in inputs.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        raise ExportError(
            f"the example input '{other}' is a {type(inputs[other]).__name__}; expected a tensor of PyTorch"
        )
    added = [name for name in (derivative.cotangent, derivative.vector) if name is not None]
    names = [*inputs, *added, *derivative.names]
    taken = next((name for index, name in enumerate(names) if not name or name in names[index + 1 :]), None)
    if taken is not None:
        reserved = ("grad", "product", "value")
        what = "an input" if taken in added or (taken in inputs and taken in (*reserved, "")) else "an output"
        raise ExportError(f"{what} cannot be called {taken!r}", hint="Give it another name.")
    if not inputs[wrt].is_floating_point():
        raise ExportError(f"input '{wrt}' is {inputs[wrt].dtype}; only floating-point inputs have a gradient")


def _check_outputs(model: ir.Model, derivative: Derivative) -> None:
    for name, value in zip(derivative.outputs, model.graph.outputs, strict=True):
        shape = value.shape
        scalar = name == derivative.of and derivative.cotangent is None
        if shape is not None and len(shape) and shape[0] == BATCH and (len(shape) == 1 or not scalar):
            continue
        refuse_unknown(model)  # the exporter may not know the shapes of their results
        if scalar:
            raise ExportError(
                f"the scalar has shape {shape}, expected [{BATCH}]: one number for each sample",
                hint="Pass scalar=..., for instance scalar=lambda out, x: out.sum(dim=1).",
            )
        raise ExportError(f"output '{name}' has shape {shape}; its first axis must be the batch, {BATCH}")


def _ones_like(value: ir.Value, batch: int) -> Tensor:
    """A tensor of ones with the shape and dtype of a value of the graph.

    Raises:
        ExportError: if an axis other than the batch has no fixed size, or the dtype is not a float.
    """
    sizes = [size for size in (value.shape or ())[1:] if isinstance(size, int)]
    if value.dtype not in _DTYPES or len(sizes) + 1 != len(value.shape or ()):
        raise ExportError(
            f"output '{value.name}' is {value.dtype} {value.shape}; expected floats, of fixed sizes but for N"
        )
    return torch.ones(batch, *sizes, dtype=_DTYPES[value.dtype])


def _names(values: Sequence[ir.Value]) -> tuple[str, ...]:
    return tuple(value.name or "" for value in values)
