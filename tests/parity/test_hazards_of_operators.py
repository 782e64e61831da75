"""Ways in which the gradient of an operator goes wrong; every check also sees a graph with the defect.

The numbers go on from those of whole gradients, in ``test_hazards.py``.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from goldens import generated_weights, relative_error, standard_normal
from onnx_graphs import (
    CLASSES,
    batch_of,
    differentiated,
    forward_graph,
    fresh_gradient,
    gradient_graph,
    op_types,
    parse,
    proto,
    run,
)

from admtrt.errors import ExportError
from admtrt.export import vjp
from admtrt.export.capture import graph_from_module
from admtrt.export.gradient import export_input_gradient
from admtrt.export.graphs import EXAMPLE_BATCH
from admtrt.export.tape import Tape
from admtrt.models.classifier import log_prob
from admtrt.models.layers import AttentionPool

if TYPE_CHECKING:
    from pathlib import Path


# The bar for every graph against PyTorch in fp32, per sample.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def exported() -> onnx.ModelProto:
    """The gradient of the classifier with attention pooling."""
    return gradient_graph("attention")


# --- 2: the backward of convolutions --------------------------------------------------------------------


def convolutions() -> torch.nn.Module:
    """Stride 1 and 2, 1x1, an even kernel with uneven reach, groups; weights are most of its bytes."""
    return generated_weights(
        torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3, padding=1),
            torch.nn.Tanh(),
            torch.nn.Conv2d(16, 32, 3, stride=2, padding=1),
            torch.nn.Tanh(),
            torch.nn.Conv2d(32, 32, 1),
            torch.nn.Tanh(),
            torch.nn.Conv2d(32, 32, 4, padding=1),
            torch.nn.Tanh(),
            torch.nn.Conv2d(32, 8, 3, groups=4),
        )
    )


@pytest.fixture(scope="module")
def convolution_graph() -> tuple[torch.nn.Module, onnx.ModelProto]:
    module = convolutions()
    scalar = torch.nn.Sequential(module, torch.nn.Flatten(), SumOfSquares()).eval()
    return scalar, proto(graph_from_module(scalar, {"x": torch.zeros(EXAMPLE_BATCH, 3, 8, 8)}, ["value"]))


class SumOfSquares(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * x).sum(dim=1)


def check_against_autograd(model: onnx.ModelProto, module: torch.nn.Module, x: torch.Tensor) -> None:
    leaf = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(copy.deepcopy(module).double()(leaf).sum(), leaf)
    assert relative_error(run(model, x=x)["grad"], expected) <= TOLERANCE


def weight_bytes(model: onnx.ModelProto) -> int:
    return sum(
        onnx.numpy_helper.to_array(tensor).nbytes
        for tensor in model.graph.initializer
        if len(tensor.dims) > 2
    )


def check_weights(model: onnx.ModelProto, forward: onnx.ModelProto, copies: int) -> None:
    assert weight_bytes(model) <= copies * weight_bytes(forward)


@pytest.mark.parametrize(("conv_backward", "copies"), [("flipped", 2), ("transposed", 1)])
def test_hazard_02_convolution_backward(
    convolution_graph: tuple[torch.nn.Module, onnx.ModelProto], conv_backward: Any, copies: int
) -> None:
    module, forward = convolution_graph
    model = differentiated(forward, conv_backward=conv_backward)
    check_against_autograd(model, module, batch_of(3)[0])
    check_weights(model, forward, copies)
    # Stride 2 and groups are transposed in both variants.
    assert op_types(model).count("ConvTranspose") == (2 if conv_backward == "flipped" else 5)


def test_hazard_02_planted(
    convolution_graph: tuple[torch.nn.Module, onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, forward = convolution_graph
    flipped = differentiated(forward, conv_backward="flipped")
    with pytest.raises(AssertionError):
        check_weights(flipped, forward, copies=1)
    for node in flipped.graph.node:
        for attribute in node.attribute:
            if attribute.name == "output_padding":
                attribute.ints[:] = [0] * len(attribute.ints)
    with pytest.raises(AssertionError):
        check_against_autograd(flipped, module, batch_of(3)[0])
    monkeypatch.setattr(
        vjp.products, "_flipped", lambda weights: np.ascontiguousarray(weights.swapaxes(0, 1))
    )
    with pytest.raises(AssertionError):
        check_against_autograd(differentiated(forward, conv_backward="flipped"), module, batch_of(3)[0])


# --- 3: the backward of group normalisation -------------------------------------------------------------

GROUP = 2**16
NORM = f"""g ({{type}}[N, 2, {GROUP}] x, {{type}}[N, 2, {GROUP}] w) => ({{type}}[N] value) {{{{
    y = InstanceNormalization (x, scale, bias)
    weighted = Mul (y, w)
    value = ReduceSum <keepdims = 0> (weighted, axes)
}}}}"""


def norm_graph(dtype: Any) -> onnx.ModelProto:
    """A group norm of 2 groups in the form in which it is exported."""
    constants = {"scale": np.ones(2, dtype), "bias": np.zeros(2, dtype), "axes": np.int64([1, 2])}
    return differentiated(parse(NORM.format(type="float" if dtype == np.float32 else "float16"), constants))


def check_norm(model: onnx.ModelProto, dtype: Any, tolerance: float) -> None:
    """Mean 100 and deviation 1: squares lose four digits, and in float16 they overflow."""
    x = (100 + standard_normal("hazards.norm", (2, 2, GROUP))).astype(dtype)
    w = standard_normal("hazards.norm.w", (2, 2, GROUP)).astype(dtype)
    leaf = torch.from_numpy(x).double().requires_grad_()
    y = torch.nn.functional.instance_norm(leaf)
    (expected,) = torch.autograd.grad((y * torch.from_numpy(w)).sum(), leaf)
    assert relative_error(run(model, x=x, w=w)["grad"], expected) <= tolerance


def check_reductions_in_fp32(model: onnx.ModelProto) -> None:
    inferred = onnx.shape_inference.infer_shapes(model)
    known = (*inferred.graph.value_info, *inferred.graph.input)
    types = {value.name: value.type.tensor_type.elem_type for value in known}
    reduced = [types[node.input[0]] for node in model.graph.node if node.op_type == "ReduceMean"]
    assert reduced
    assert set(reduced) == {onnx.TensorProto.FLOAT}


def test_hazard_03_group_norm_backward_in_fp32() -> None:
    check_norm(norm_graph(np.float32), np.float32, TOLERANCE)
    half = norm_graph(np.float16)
    check_reductions_in_fp32(half)
    check_norm(half, np.float16, 2e-3)  # float16 has 11 bits: two roundings of 5e-4, one on the way out


def naive_normalisation(
    tape: Any, x: ir.Value, g: ir.Value, axes: list[int], epsilon: float, normalised: Any = None
) -> ir.Value:
    """E[x^2] - E[x]^2 in the graph's own type."""
    mean = tape.op("ReduceMean", x, tape.ints(*axes), keepdims=1)
    square = tape.op("ReduceMean", tape.op("Mul", x, x), tape.ints(*axes), keepdims=1)
    variance = tape.op("Sub", square, tape.op("Mul", mean, mean))
    std = tape.op("Sqrt", tape.op("Add", variance, tape.scalar(epsilon, x)))
    y = tape.op("Div", tape.op("Sub", x, mean), std)
    mean_g = tape.op("ReduceMean", g, tape.ints(*axes), keepdims=1)
    mean_gy = tape.op("ReduceMean", tape.op("Mul", g, y), tape.ints(*axes), keepdims=1)
    return tape.op("Div", tape.op("Sub", tape.op("Sub", g, mean_g), tape.op("Mul", y, mean_gy)), std)


def test_hazard_03_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vjp.normalisation, "_normalisation", naive_normalisation)
    with pytest.raises(AssertionError):
        check_norm(norm_graph(np.float32), np.float32, TOLERANCE)
    half = norm_graph(np.float16)
    with pytest.raises(AssertionError):
        check_reductions_in_fp32(half)
    with pytest.raises(AssertionError):
        check_norm(half, np.float16, 2e-3)


# --- 4: the backward of pooling and of upsampling -------------------------------------------------------

RESIZE = """g (float[N, 3, 8, 8] x) => (float[N] value) {
    pooled = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (x)
    p = Tanh (pooled)
    u = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
        (p, , scales)
    q = Mul (u, x)
    value = ReduceSum <keepdims = 0> (q, axes)
}"""
FORBIDDEN = ("Scatter", "Gather", "OneHot", "NonZero", "Loop", "If", "Scan")


class PoolAndEnlarge(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = torch.nn.functional.avg_pool2d(x, 2).tanh()
        return (torch.nn.functional.interpolate(pooled, scale_factor=2.0) * x).sum(dim=(1, 2, 3))


def resize_graph() -> onnx.ModelProto:
    return differentiated(parse(RESIZE, {"scales": np.float32([1, 1, 2, 2]), "axes": np.int64([1, 2, 3])}))


def check_plain(model: onnx.ModelProto, *more: str) -> None:
    assert not [op for op in op_types(model) if op.startswith((*FORBIDDEN, *more))]


def test_hazard_04_pooling_and_upsampling_backward(exported: onnx.ModelProto) -> None:
    model = resize_graph()
    check_against_autograd(model, PoolAndEnlarge(), batch_of(3)[0])
    check_plain(model, "ConvTranspose")
    assert op_types(model).count("AveragePool") == op_types(model).count("Resize") == 2
    check_plain(exported, "ConvTranspose")  # residual blocks that halve the image
    assert op_types(exported).count("AveragePool") == op_types(exported).count("Resize") == 2


def test_hazard_04_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    def unscaled(tape: Any, node: ir.Node, incoming: Any) -> Any:
        return [vjp.sampling.enlarged(tape, incoming[0], [2, 2])]

    def through_convolution(tape: Any, node: ir.Node, incoming: Any) -> Any:
        share = tape.array(np.full((3, 1, 2, 2), 0.25, np.float32))
        return [tape.op("ConvTranspose", incoming[0], share, strides=[2, 2], group=3)]

    monkeypatch.setitem(vjp.RULES, "AveragePool", unscaled)
    with pytest.raises(AssertionError):
        check_against_autograd(resize_graph(), PoolAndEnlarge(), batch_of(3)[0])
    monkeypatch.setitem(vjp.RULES, "AveragePool", through_convolution)
    with pytest.raises(AssertionError):
        check_plain(resize_graph(), "ConvTranspose")


# --- 5: the label ---------------------------------------------------------------------------------------


class OneHot(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return log_prob(lambda logits, _: logits, x, x, y)


class Gathered(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(x, dim=1).gather(1, y[:, None])[:, 0]


class Indexed(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(x, dim=1)[torch.arange(x.shape[0]), y]


def check_label(module: torch.nn.Module, path: Path, *, plain: bool = True) -> None:
    export_input_gradient(
        module.eval(), {"x": torch.zeros(2, CLASSES), "y": torch.zeros(2, dtype=torch.int64)}, path
    )
    model = onnx.load(path)
    if plain:
        check_plain(model)
    assert not any(op.startswith("Scatter") for op in op_types(model))
    logits, y = torch.from_numpy(standard_normal("hazards.logits", (3, CLASSES))), torch.tensor([4, 0, 4])
    expected = torch.nn.functional.one_hot(y, CLASSES) - logits.double().softmax(dim=1)
    assert relative_error(run(model, x=logits, y=y)["grad"], expected) <= TOLERANCE


def test_hazard_05_one_hot_label(exported: onnx.ModelProto, tmp_path: Path) -> None:
    check_label(OneHot(), tmp_path / "g.onnx")
    check_plain(exported)


def test_hazard_05_gathered_label(tmp_path: Path) -> None:
    """Gathered forwards, a one-hot product backwards."""
    check_label(Gathered(), tmp_path / "g.onnx", plain=False)


def test_hazard_05_planted(tmp_path: Path) -> None:
    with pytest.raises((ExportError, AssertionError), match="Gather"):
        check_label(Indexed(), tmp_path / "g.onnx")


# --- 6: slices and concatenations of the attention pool -------------------------------------------------


class PoolScore(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = AttentionPool(4, 32, 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(x).logsumexp(dim=1)


@pytest.fixture(scope="module")
def pool_graph() -> tuple[torch.nn.Module, onnx.ModelProto]:
    module = generated_weights(PoolScore())
    return module, proto(graph_from_module(module, {"x": torch.zeros(EXAMPLE_BATCH, 32, 4, 4)}, ["value"]))


def check_attention_pool(module: torch.nn.Module, forward: onnx.ModelProto) -> None:
    model = differentiated(forward)
    check_plain(model)
    check_against_autograd(model, module, torch.from_numpy(standard_normal("hazards.pool", (3, 32, 4, 4))))
    assert {"Slice", "Concat", "Pad", "Split"} <= set(op_types(model))


def test_hazard_06_slice_and_concat_backward(pool_graph: tuple[torch.nn.Module, onnx.ModelProto]) -> None:
    check_attention_pool(*pool_graph)


def scattered(tape: Any, value: ir.Value, before: Any, after: Any) -> ir.Value:
    """The first position of the last axis, put back as autograd does it."""
    assert list(before) == [0, 0, 0, 0]
    zeros = tape.op("Pad", tape.op("Mul", value, tape.scalar(0.0, value)), tape.ints(*before, *after))
    index = tape.op("Expand", tape.ints(0), tape.op("Shape", value))
    return tape.op("ScatterElements", zeros, index, value, axis=3)


def test_hazard_06_planted(
    pool_graph: tuple[torch.nn.Module, onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    pad = Tape.padded
    monkeypatch.setattr(Tape, "padded", scattered)
    with pytest.raises(AssertionError, match="Scatter"):
        check_attention_pool(*pool_graph)
    monkeypatch.setattr(Tape, "padded", lambda tape, value, before, after: pad(tape, value, after, before))
    with pytest.raises(AssertionError):
        check_attention_pool(*pool_graph)


# --- 7: the sigmoid of SiLU -----------------------------------------------------------------------------

_SILU_BACKWARD = 4  # 1 - s, y (1 - s), s + y (1 - s), and the product with the incoming gradient
SILU = """g (float[N, 4] x) => (float[N] value) {
    s = Sigmoid (x)
    y = Mul (x, s)
    value = ReduceSum <keepdims = 0> (y, axes)
}"""


def check_sigmoids() -> None:
    forward = parse(SILU, {"axes": np.int64([1])})
    model = differentiated(forward)
    # Beside SiLU: the ones of the scalar's gradient in x's shape (Shape, Expand, Unsqueeze, Expand).
    assert len(model.graph.node) - len(forward.graph.node) - 4 <= _SILU_BACKWARD
    full = fresh_gradient("attention")
    assert op_types(full).count("Sigmoid") == op_types(proto(forward_graph("attention"))).count("Sigmoid")


def test_hazard_07_sigmoid_shared() -> None:
    check_sigmoids()


def test_hazard_07_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    def recomputed(tape: Any, g: ir.Value, *, silu: ir.Value, sigmoid: ir.Value) -> ir.Value:
        x = sigmoid.producer().inputs[0]
        return silu_rule(tape, g, silu=silu, sigmoid=tape.op("Sigmoid", x))

    def generic(tape: Any, node: ir.Node, incoming: Any) -> Any:
        a, b = node.inputs
        return [
            tape.sum_to(tape.op("Mul", incoming[0], other), own, node.outputs[0])
            for own, other in ((a, b), (b, a))
        ]

    silu_rule = vjp.elementwise._silu  # noqa: SLF001 - the defect takes its place, and calls it
    with monkeypatch.context() as patch:
        patch.setattr(vjp.elementwise, "_silu", recomputed)
        with pytest.raises(AssertionError):
            check_sigmoids()
    monkeypatch.setitem(vjp.RULES, "Mul", generic)
    with pytest.raises(AssertionError):
        check_sigmoids()
