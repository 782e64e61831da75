"""PyTorch module -> forward ONNX graph with one dynamic axis, free of shape arithmetic."""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import Tensor, nn

from admtrt.contract import BATCH, NODE_SCOPES
from admtrt.errors import ExportError
from admtrt.export.fold import fold
from admtrt.export.inside import insert_files, newest_opset
from admtrt.export.nodes import ATEN, module_of
from admtrt.export.passes import simplify
from admtrt.export.plain import plain
from admtrt.export.sizes import compute_sizes
from admtrt.export.tidy import tidy
from admtrt.export.untranslated import Translated

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

OPSET = 18
"""The oldest opset that can express every graph, with group norms as InstanceNormalization."""
RANDOM_HINT = "Draw random numbers outside of the module and give them to it as an input."
_RANDOM = (
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
)  # fmt: skip


class _Positional(nn.Module):
    """Wraps a module in the signature that the dynamic axes below describe."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        out: Tensor | tuple[Tensor, ...] = self.module(*inputs)
        return out


def graph_from_module(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    *,
    opset: int = OPSET,
) -> ir.Model:
    """Export ``module(*inputs.values())``, the first axis of every input being the dynamic batch ``N``.

    The module returns a tensor, or a tuple of several.

    Args:
        module: any module, with all submodules in evaluation mode.
        inputs: example tensors by graph name, in the order of ``forward``; batch of at least 2.
        outputs: graph names of the outputs, in order.
        opset: of the default ONNX domain; raised to the newest opset of the ONNX files in the module.

    Raises:
        ExportError: if PyTorch cannot capture the module, or the graph works for one batch size only.
    """
    if any(part.training for part in module.modules()):
        raise ExportError("the module or a part of it is in training mode", hint="Call module.eval() first.")
    if opset < OPSET:
        raise ExportError(f"opset {opset} is too old; gradients are written in operators of {OPSET} or later")
    opset = max(opset, newest_opset(module))
    flat = [name for name, tensor in inputs.items() if not tensor.dim()]
    if flat:
        raise ExportError(
            f"the example input '{flat[0]}' has no batch axis",
            hint="Give every input the same first axis, of size 2 for instance.",
        )
    sizes = {name: tensor.shape[0] for name, tensor in inputs.items()}
    if len(set(sizes.values())) != 1 or min(sizes.values()) < 2:
        raise ExportError(
            f"the example inputs have batch sizes {sizes}; expected one size of 2 or more, as 1 is frozen",
            hint="Give every input the same first axis, of size 2 for instance.",
        )
    batch = torch.export.Dim(BATCH)
    try:
        with _quiet(), torch.no_grad(), Translated():
            program = torch.onnx.export(
                _Positional(module).eval(),
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes=(tuple({0: batch} for _ in inputs),),
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=opset,
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # torch raises many unrelated types here
        raise ExportError(f"PyTorch cannot export the module: {_innermost(error)}") from error
    assert program is not None  # always set by the dynamo exporter
    model: ir.Model = program.model
    if len(model.graph.outputs) != len(outputs):
        raise ExportError(
            f"the module returns {len(model.graph.outputs)} tensors; expected {len(outputs)}: "
            f"{', '.join(outputs)}"
        )
    insert_files(model)
    InlinePass()(model)
    _refuse_randomness(model.graph)
    _note_sources(model.graph)
    _rename_clashes(model.graph)
    _check_batch_free(model.graph)
    _name_batch_axis(model)
    tidy(model)
    while compute_sizes(model):
        tidy(model)
    plain(model)
    simplify(model)
    fold(model)
    simplify(model)
    return model


def _innermost(error: BaseException) -> str:
    """The first line of the root cause, which PyTorch wraps repeatedly in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _refuse_randomness(graph: ir.Graph) -> None:
    """Refuse modules that draw random numbers: each run would differentiate another function."""
    for node in graph:
        # PyTorch exports a Dropout only in training mode.
        if node.op_type in _RANDOM or node.op_type == "Dropout":
            raise ExportError(
                f"the module draws random numbers: operator '{node.op_type}'{module_of(node)}",
                hint=RANDOM_HINT,
            )


def _note_sources(graph: ir.Graph) -> None:
    """Keep a node's module in its metadata, and its PyTorch function in memory. Remove all else.

    The call stack contains paths of this machine.
    """
    for node in graph:
        scopes = node.metadata_props.get(NODE_SCOPES)
        _, known, function = node.metadata_props.get("namespace", "").rpartition(": aten.")
        node.meta[ATEN] = function if known else ""
        node.metadata_props.clear()
        if scopes is not None:
            node.metadata_props[NODE_SCOPES] = scopes


def _rename_clashes(graph: ir.Graph) -> None:
    """Rename inner values that clash with inputs or outputs: PyTorch names them without checking."""
    ends = (*graph.inputs, *graph.outputs)
    taken = {value.name for value in ends}
    for value in (*_all_values(graph), *graph.initializers.values()):
        if value.name in taken and not any(value is end for end in ends):
            value.name = f"inner_{value.name}"


def _check_batch_free(graph: ir.Graph) -> None:
    """Refuse graphs for one batch size: PyTorch's fallbacks silently ignore the dynamic axis."""
    for value in graph.inputs:
        if value.shape is None or isinstance(value.shape[0], int):
            raise ExportError(
                f"PyTorch fixed the input '{value.name}' to the shape {value.shape} of the example",
                hint="Write it for any batch: x.shape[0] in place of len(x), no reshape to a fixed size, and "
                "scores.gather(1, y[:, None]) in place of scores[range(len(y)), y].",
            )


def _name_batch_axis(model: ir.Model) -> None:
    """Rename the batch axis to its contract name; PyTorch may have called it ``s0``."""
    first = model.graph.inputs[0].shape
    assert first is not None
    symbol = first[0]
    for value in _all_values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([ir.SymbolicDim(BATCH) if dim == symbol else dim for dim in value.shape])


def _all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notices about optional packages and its own internals off the terminal."""
    loggers: list[Any] = [
        logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
