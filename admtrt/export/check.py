"""Checks that every exported graph must pass before it enters a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

from admtrt.errors import ExportError, UserError
from admtrt.export.proto import dims_of_value
from admtrt.runtime.engines.library import find_library, logger_of

if TYPE_CHECKING:
    from pathlib import Path

    from admtrt.contract import GraphSpec

_ELEMENT_TYPES = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})


def check_graph(path: Path, spec: GraphSpec, *, example_batch: int) -> None:
    """Check a file on disk: validity with full shape inference, contract, operators, frozen constants.

    Raises:
        ExportError: naming what is wrong.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker raises several unrelated types
        raise ExportError(f"{path.name} is not a valid graph: {error}") from error
    model = onnx.load(str(path), load_external_data=False)
    _check_contract(path.name, model, spec)
    _check_operators(path.name, model)
    _check_frozen_batch(path.name, model, example_batch)


def _check_contract(name: str, model: onnx.ModelProto, spec: GraphSpec) -> None:
    for what, values, tensors in (
        ("inputs", model.graph.input, spec.inputs),
        ("outputs", model.graph.output, spec.outputs),
    ):
        found = [
            (
                value.name,
                value.type.tensor_type.elem_type,
                dims_of_value(value),
            )
            for value in values
        ]
        expected = [(tensor.name, _ELEMENT_TYPES[tensor.dtype], tensor.shape) for tensor in tensors]
        if found != expected:
            raise ExportError(f"{name}: {what} are {found}, expected {expected}")


def _check_operators(name: str, model: onnx.ModelProto) -> None:
    """Refuse scatters with a reduction, which engines reject, and control flow, which cannot be captured."""
    for node in model.graph.node:
        reduction = next((a.s.decode() for a in node.attribute if a.name == "reduction"), "none")
        if node.op_type.startswith("Scatter") and reduction != "none":
            raise ExportError(f"{name}: node '{node.name}' is a {node.op_type} with reduction '{reduction}'")
        if node.op_type in _CONTROL_FLOW:
            raise ExportError(f"{name}: node '{node.name}' is control flow ({node.op_type})")
        if node.domain not in ("", "ai.onnx"):
            raise ExportError(f"{name}: node '{node.name}' comes from the domain '{node.domain}'")
    if model.functions:
        raise ExportError(f"{name}: holds local functions, which engines do not inline alike")


def _check_frozen_batch(name: str, model: onnx.ModelProto, example_batch: int) -> None:
    """Refuse values, other than initializers, whose batch axis has the traced example's size.

    The sign of a frozen value: its first size is the example's batch, but its producer has a dynamic input.
    """
    dynamic = {value.name for value in model.graph.input}
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes = {
        value.name: dims_of_value(value) for value in (*inferred.graph.value_info, *inferred.graph.output)
    }
    for node in model.graph.node:
        if dynamic.isdisjoint(node.input) or node.op_type == "Shape":  # a Shape is no activation
            continue
        dynamic.update(node.output)
        for output in node.output:
            shape = shapes.get(output)
            if shape and shape[0] == example_batch:
                raise ExportError(f"{name}: '{output}' is fixed to the traced batch of {example_batch}")


def rtx_parser_errors(path: Path) -> list[str] | None:
    """Errors of TensorRT-RTX's parser, which needs no GPU; None if it is not installed."""
    try:
        trt = find_library("rtx").module
    except UserError:
        return None
    logger = logger_of(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(path)):
        return []
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return [f"{error.node_operator()} '{error.node_name()}': {error.desc()}" for error in errors]
