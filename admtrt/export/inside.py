"""ONNX files as PyTorch modules: run by ONNX Runtime, exported as their own nodes, differentiable."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript.version_converter import convert_version
from torch import Tensor, nn

from admtrt.contract import BATCH
from admtrt.errors import ExportError, LossError
from admtrt.export.passes import simplify
from admtrt.export.plain import plain
from admtrt.export.proto import sizes_of_value
from admtrt.export.tidy import tidy
from admtrt.runtime.backends.onnxruntime import import_onnxruntime

if TYPE_CHECKING:
    from pathlib import Path

_DOMAIN, _NODE, _HANDLE = "admtrt", "File", "handle"
_OPSETS = (18, 22)  # the oldest and the newest supported
_LARGEST = 2**31  # bytes, the limit of protocol buffers
_HINT = "Export it with a dynamic batch: one image input [N, C, H, W], the features as its first output."


@dataclass(frozen=True, eq=False)
class _File:
    """An ONNX file with one image input, of which the first output is used.

    Attributes:
        path: of the file.
        model: the model with inferred shapes; its batch axis is called N.
    """

    path: Path
    model: onnx.ModelProto

    @property
    def image(self) -> tuple[int, ...]:
        """(C, H, W) of its input."""
        return sizes_of_value(self.model.graph.input[0])[1:]

    @property
    def result(self) -> tuple[int, ...]:
        """Shape of its output without the batch."""
        return sizes_of_value(self.model.graph.output[0])[1:]

    def copy(self) -> ir.Model:
        """A copy of the graph. Graphs read from the same message would share renamed values."""
        copied = onnx.ModelProto()
        copied.CopyFrom(self.model)
        return ir.from_proto(copied)

    @property
    def opset(self) -> int:
        """The opset of its operators."""
        versions = {one.domain: one.version for one in self.model.opset_import}
        found: int = versions.get("") or versions["ai.onnx"]
        return found

    @cached_property
    def session(self) -> Any:
        """An ONNX Runtime session of the file."""
        return self._session(self.model)

    @cached_property
    def gradient(self) -> Any:
        """An ONNX Runtime session of the vector-Jacobian product: ``grad`` from ``x`` and ``cotangent``."""
        from admtrt.export.differentiate import add_input_gradient

        model = self.copy()
        for prepare in (tidy, plain, simplify):
            prepare(model)
        graph = model.graph
        out, source = graph.outputs[0], graph.inputs[0]
        given = ir.Value(name="cotangent", shape=out.shape, type=out.type)
        graph.inputs.append(given)
        product = ir.node("Mul", [out, given])
        product.outputs[0].shape, product.outputs[0].type = out.shape, out.type
        axes = ir.Value(
            name="cotangent_axes",
            const_value=ir.tensor(list(range(1, len(self.result) + 1)), dtype=ir.DataType.INT64),
        )
        graph.register_initializer(axes)
        total = ir.node("ReduceSum", [product.outputs[0], axes], attributes={"keepdims": 0})
        total.outputs[0].shape, total.outputs[0].type = ir.Shape([ir.SymbolicDim(BATCH)]), out.type
        total.outputs[0].name = "weighted"
        for node in (product, total):
            graph.append(node)
        graph.outputs[:] = [total.outputs[0]]
        assert source.name is not None
        add_input_gradient(model, wrt=source.name, of="weighted", name="grad")
        return self._session(ir.to_proto(model))

    @staticmethod
    def _session(model: onnx.ModelProto) -> Any:
        onnxruntime = import_onnxruntime(extra="cpu", purpose="A guide with an ONNX file")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


_FILES: list[_File] = []
_LOCK = threading.Lock()


class OnnxFile(nn.Module):
    """An ONNX file as a module that maps images [N, C, H, W] to its first output.

    Args:
        path: of the file; one image input in float32 with a dynamic batch.

    Raises:
        LossError: if the file cannot be read or has other inputs.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        loaded = _read(path)
        with _LOCK:
            _FILES.append(loaded)
            self.handle = len(_FILES) - 1
        self.image, self.result = loaded.image, loaded.result

    def forward(self, x: Tensor) -> Tensor:
        """Its first output."""
        if torch.onnx.is_in_onnx_export():
            shape = (x.shape[0], *self.result)
            attributes: dict[str, Any] = {_HANDLE: self.handle}
            return torch.onnx.ops.symbolic(
                f"{_DOMAIN}::{_NODE}", (x,), attributes, dtype=x.dtype, shape=shape, version=1
            )
        out: Tensor = torch.ops.admtrt.file(x, self.handle)
        return out


def _read(path: Path) -> _File:
    try:
        if path.stat().st_size > _LARGEST:
            raise LossError(f"{path} is larger than 2 GiB")
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except ExportError:
        raise
    except Exception as error:  # onnx raises several unrelated types
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise LossError(f"cannot read {path} as an ONNX file: {reason}") from None
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1 or len(inputs[0].type.tensor_type.shape.dim) != 4:
        names = ", ".join(value.name for value in inputs)
        raise LossError(f"{path} takes {names or 'nothing'}; expected one image", hint=_HINT)
    first = inputs[0].type.tensor_type
    if first.elem_type != onnx.TensorProto.FLOAT:
        raise LossError(f"{path} takes no float32 image", hint=_HINT)
    if first.shape.dim[0].dim_value:
        raise LossError(f"{path} is fixed to a batch of {first.shape.dim[0].dim_value}", hint=_HINT)
    del model.graph.input[:]
    model.graph.input.append(inputs[0])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = BATCH
    del model.graph.value_info[:]
    del model.graph.output[1:]
    _forget_batch(model.graph.output[0])
    converted = ir.from_proto(model)
    oldest, newest = _OPSETS
    if converted.opset_imports.get("", 0) > newest:
        raise LossError(
            f"{path} has opset {converted.opset_imports['']}", hint=f"Export it with opset {newest} or older."
        )
    _raise_opset(converted, oldest, path)
    shaped = onnx.shape_inference.infer_shapes(ir.to_proto(converted), data_prop=True)
    found = _File(path, shaped)
    if not found.result or 0 in (*found.image, *found.result):
        raise LossError(f"{path}: the sizes of its image or its first output are not fixed", hint=_HINT)
    return found


def _raise_opset(model: ir.Model, opset: int, path: Path) -> None:
    if model.opset_imports.get("", 0) < opset:
        convert_version(model, opset)
    if model.opset_imports.get("", 0) < opset:
        raise LossError(f"{path} cannot be converted to opset {opset}", hint="Export it with that one.")


def _forget_batch(value: onnx.ValueInfoProto) -> None:
    dims = value.type.tensor_type.shape.dim
    if dims:
        dims[0].Clear()
        dims[0].dim_param = BATCH


@torch.library.custom_op("admtrt::file", mutates_args=())
def _run(x: Tensor, handle: int) -> Tensor:
    file = _FILES[handle]
    (out,) = file.session.run(None, {file.model.graph.input[0].name: x.detach().float().numpy()})
    return torch.from_numpy(out).to(x.dtype)


@_run.register_fake
def _(x: Tensor, handle: int) -> Tensor:
    return x.new_empty((x.shape[0], *_FILES[handle].result))


@torch.library.custom_op("admtrt::file_gradient", mutates_args=())
def _run_backward(x: Tensor, cotangent: Tensor, handle: int) -> Tensor:
    file = _FILES[handle]
    feeds = {file.model.graph.input[0].name: x, "cotangent": cotangent}
    arrays = {name: np.ascontiguousarray(one.detach().float().numpy()) for name, one in feeds.items()}
    (grad,) = file.gradient.run(["grad"], arrays)
    return torch.from_numpy(grad).to(x.dtype)


@_run_backward.register_fake
def _(x: Tensor, cotangent: Tensor, handle: int) -> Tensor:  # noqa: ARG001 - one signature
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - PyTorch's signature
    ctx.save_for_backward(inputs[0])
    ctx.handle = inputs[1]


def _backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return torch.ops.admtrt.file_gradient(x, cotangent.contiguous(), ctx.handle), None


_run.register_autograd(_backward, setup_context=_keep)


def insert_files(model: ir.Model) -> None:
    """Replace each operator that stands for a file by the file's nodes."""
    for count, node in enumerate([node for node in model.graph if node.domain == _DOMAIN]):
        file = _FILES[node.attributes[_HANDLE].as_int()]
        read = file.copy()
        _raise_opset(read, model.opset_imports[""], file.path)
        inner = read.graph
        constants = list(inner.initializers.values())
        inner.initializers.clear()
        for number, value in enumerate([*constants, *_outputs(inner)]):
            value.name = f"file{count}.{number}"
        for value in constants:
            model.graph.register_initializer(value)
        source, target = node.inputs[0], node.outputs[0]
        assert source is not None
        ir.convenience.replace_all_uses_with(inner.inputs[0], source)
        found = inner.outputs[0]
        moved = list(inner)
        inner.outputs.clear()
        inner.remove(moved)
        model.graph.insert_before(node, moved)
        found.shape, found.type = target.shape, target.type
        name = target.name if target.is_graph_output() else found.name
        ir.convenience.replace_all_uses_with(target, found, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        found.name = name


def newest_opset(module: nn.Module) -> int:
    """The newest opset of the ONNX files in a module; 0 without files."""
    files = [part for part in module.modules() if isinstance(part, OnnxFile)]
    return max((_FILES[file.handle].opset for file in files), default=0)


def _outputs(graph: ir.Graph) -> list[ir.Value]:
    return [value for node in graph for value in node.outputs]
