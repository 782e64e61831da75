"""The ten ways in which an exported gradient goes wrong; every check also sees a graph with the defect."""

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
    POOLS,
    differentiated,
    forward_graph,
    fresh_gradient,
    gradient_graph,
    op_types,
    parse,
    proto,
    run,
    session,
    small_classifier,
)

from admtrt.config import DiffusionConfig
from admtrt.contract import classifier_gradient_spec
from admtrt.errors import ExportError
from admtrt.export import vjp
from admtrt.export.capture import graph_from_module
from admtrt.export.check import check_graph
from admtrt.export.gradient import export_input_gradient
from admtrt.export.graphs import EXAMPLE_BATCH
from admtrt.export.tape import Tape
from admtrt.models.classifier import Classifier, log_prob, log_prob_gradient
from admtrt.models.diffusion import Diffusion
from admtrt.models.layers import AttentionPool
from admtrt.schedule.process import process_from_config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# The bar for every graph against PyTorch in fp32, per sample.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def exported() -> onnx.ModelProto:
    """The gradient of the classifier with attention pooling; tests edit copies."""
    return gradient_graph("attention")


def batch_of(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.from_numpy(standard_normal(f"hazards.x{size}", (size, 3, 8, 8)))
    t = torch.tensor([37.0, 999.0, 0.0, 412.5, 730.0])[:size]
    return x, t, torch.tensor([3, 0, 4, 1, 2])[:size]


def gradient(model: Any, x: Any, t: Any, y: Any) -> np.ndarray:
    return run(model, x=x, t=t, y=y)["grad"]


def edited(model: onnx.ModelProto) -> onnx.ModelProto:
    return copy.deepcopy(model)


def replace_input(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


def add_constant(model: onnx.ModelProto, name: str, values: Any) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))


def after_output(model: onnx.ModelProto, name: str, *nodes: onnx.NodeProto) -> None:
    """Put nodes that read ``inner`` and write ``name`` between the output ``name`` and what made it."""
    for node in model.graph.node:
        node.output[:] = ["inner" if output == name else output for output in node.output]
    replace_input(model, name, "inner")
    model.graph.node.extend(nodes)


# --- 1: nothing of the traced example stays in the graph ------------------------------------------------


def check_reacts(graph: onnx.ModelProto, classifier: Classifier) -> None:
    model = session(graph)
    for size in (1, 3, 5):
        x, t, y = batch_of(size)
        grad = gradient(model, x, t, y)
        assert relative_error(grad, log_prob_gradient(classifier, x, t, y)) <= TOLERANCE
        for other in ((x + 0.5, t, y), (x, t + 50, y), (x, t, (y + 1) % CLASSES)):
            assert (
                np.abs(gradient(model, *other) - grad).max(axis=(1, 2, 3)) > 1e-3 * np.abs(grad).max()
            ).all()


@pytest.mark.parametrize("pool", POOLS)
def test_hazard_01_reacts_to_every_input_at_every_batch_size(pool: str) -> None:
    check_reacts(gradient_graph(pool), small_classifier(pool))


def test_hazard_01_planted(exported: onnx.ModelProto) -> None:
    classifier = small_classifier("attention")
    for name, frozen in (("t", np.float32([500])), ("y", np.int64([2]))):
        model = edited(exported)
        add_constant(model, "frozen", frozen)
        replace_input(model, name, "frozen")
        with pytest.raises(AssertionError):
            check_reacts(model, classifier)
    model = edited(exported)
    targets = {node.input[1] for node in model.graph.node if node.op_type == "Reshape"}
    for tensor in model.graph.initializer:
        if tensor.name in targets and onnx.numpy_helper.to_array(tensor)[0] == -1:
            sizes = onnx.numpy_helper.to_array(tensor).copy()
            sizes[0] = 2
            tensor.CopyFrom(onnx.numpy_helper.from_array(sizes, tensor.name))
    with pytest.raises(AssertionError):
        check_reacts(model, classifier)


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

    silu_rule = vjp.elementwise._silu
    with monkeypatch.context() as patch:
        patch.setattr(vjp.elementwise, "_silu", recomputed)
        with pytest.raises(AssertionError):
            check_sigmoids()
    monkeypatch.setitem(vjp.RULES, "Mul", generic)
    with pytest.raises(AssertionError):
        check_sigmoids()


# --- 8: small gradients at high noise -------------------------------------------------------------------

BINS = ((0, 250), (250, 500), (500, 750), (750, 1000))


@pytest.fixture(scope="module")
def faint() -> tuple[Classifier, onnx.ModelProto]:
    """A classifier whose logits are scaled by 1e-6, so that its gradients lie below float16's range."""
    classifier = copy.deepcopy(small_classifier("attention"))
    with torch.no_grad():
        for parameter in classifier.out[2].c_proj.parameters():
            parameter.mul_(1e-6)
    forward = proto(forward_graph("attention"))
    add_constant(forward, "scale", np.float32(1e-6))
    index, node = next((i, node) for i, node in enumerate(forward.graph.node) if node.op_type == "LogSoftmax")
    forward.graph.node.insert(index, onnx.helper.make_node("Mul", [node.input[0], "scale"], ["scaled"]))
    node.input[0] = "scaled"
    return classifier, differentiated(forward, of="log_prob")


def cosine_by_bin(graph: onnx.ModelProto, classifier: Classifier) -> list[float]:
    """Smallest cosine similarity to the gradient in float64 of each bin of timesteps."""
    model = session(graph)
    config = DiffusionConfig()
    diffusion = Diffusion(config, process_from_config(config))
    reference = copy.deepcopy(classifier).double()
    reference.timestep_embedding.register_forward_hook(lambda module, args, out: out.double())
    cosines = []
    for low, high in BINS:
        step = torch.linspace(low, high - 1, 5).long()
        x_0, noise, y = (
            batch_of(5)[0].clamp(-1, 1),
            torch.from_numpy(standard_normal(f"n{low}", (5, 3, 8, 8))),
            batch_of(5)[2],
        )
        x, t = diffusion.q_sample(x_0, step, noise), diffusion.model_t(step)
        expected = log_prob_gradient(reference, x.double(), t, y).flatten(1)
        actual = torch.from_numpy(gradient(model, x, t, y)).double().flatten(1)
        cosines.append(torch.nn.functional.cosine_similarity(actual, expected, eps=0).min().item())
    return cosines


def check_small_gradients(model: onnx.ModelProto, classifier: Classifier) -> None:
    for (low, high), cosine in zip(BINS, cosine_by_bin(model, classifier), strict=True):
        assert cosine >= 0.99999, f"t in [{low}, {high}): {cosine}"


def test_hazard_08_small_gradients_survive(faint: tuple[Classifier, onnx.ModelProto]) -> None:
    classifier, model = faint
    check_small_gradients(model, classifier)
    narrow = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    assert narrow.isdisjoint(value.type.tensor_type.elem_type for value in inferred.value_info)
    assert narrow.isdisjoint(tensor.data_type for tensor in inferred.initializer)


def test_hazard_08_planted(faint: tuple[Classifier, onnx.ModelProto]) -> None:
    classifier, good = faint
    model = edited(good)
    make = onnx.helper.make_node
    halved = make("Cast", ["inner"], ["half"], to=onnx.TensorProto.FLOAT16)
    after_output(model, "grad", halved, make("Cast", ["half"], ["grad"], to=onnx.TensorProto.FLOAT))
    with pytest.raises(AssertionError, match="t in"):
        check_small_gradients(model, classifier)


# --- 9: samples do not see each other -------------------------------------------------------------------


def check_rows(graph: onnx.ModelProto) -> None:
    model = session(graph)
    x, t, y = batch_of(3)
    together = gradient(model, x, t, y)
    others = gradient(model, torch.cat([x[:1], 3 * x[1:]]), t * torch.tensor([1, 0.5, 0.5]), y)
    alone = gradient(model, x[:1], t[:1], y[:1])
    # Engines may sum in another order at another batch size; a real influence is percents.
    assert relative_error(together[:1], alone) <= 1e-5
    assert relative_error(others[:1], alone) <= 1e-5


@pytest.mark.parametrize("pool", POOLS)
def test_hazard_09_rows_are_independent(pool: str) -> None:
    check_rows(gradient_graph(pool))


@pytest.mark.parametrize("reduction", ["ReduceMean", "ReduceSum"])
def test_hazard_09_planted(exported: onnx.ModelProto, reduction: str) -> None:
    model = edited(exported)
    add_constant(model, "batch_axis", np.int64([0]))
    make = onnx.helper.make_node
    mixed = make(reduction, ["inner", "batch_axis"], ["mixed"], keepdims=1)
    after_output(model, "grad", mixed, make("Sub", ["inner", "mixed"], ["grad"]))
    with pytest.raises(AssertionError):
        check_rows(model)


# --- 10: nothing frozen, nothing dead -------------------------------------------------------------------


def check_clean(model: onnx.ModelProto, path: Path) -> None:
    graph = model.graph
    for tensor in graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        assert EXAMPLE_BATCH not in tensor.dims, tensor.name
        assert values.dtype != np.int64 or EXAMPLE_BATCH not in values, tensor.name
    needed = {output.name for output in graph.output}
    for node in reversed(graph.node):
        assert needed.intersection(node.output), f"{node.op_type} '{node.name}' reaches no output"
        needed.update(node.input)
    assert {tensor.name for tensor in graph.initializer} <= needed
    onnx.save(model, path)
    try:
        check_graph(
            path, classifier_gradient_spec(small_classifier("attention").config), example_batch=EXAMPLE_BATCH
        )
    except ExportError as error:
        raise AssertionError(str(error)) from error


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("conv_backward", ["flipped", "transposed"])
def test_hazard_10_nothing_frozen_nothing_dead(pool: str, conv_backward: Any, tmp_path: Path) -> None:
    check_clean(gradient_graph(pool, conv_backward), tmp_path / "g.onnx")


def plant_saved_tensor(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Sqrt")
    add_constant(model, "saved", np.ones((EXAMPLE_BATCH, 32, 1), np.float32))
    replace_input(model, node.output[0], "saved")


def plant_fixed_reshape(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Reshape")
    add_constant(model, "frozen", np.int64([EXAMPLE_BATCH, 32, -1]))
    node.input[1] = "frozen"


def plant_dead_node(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, onnx.helper.make_node("Exp", ["x"], ["unused"]))


def plant_unused_constant(model: onnx.ModelProto) -> None:
    add_constant(model, "unused", np.float32([1]))


@pytest.mark.parametrize(
    "plant", [plant_saved_tensor, plant_fixed_reshape, plant_dead_node, plant_unused_constant]
)
def test_hazard_10_planted(
    exported: onnx.ModelProto, plant: Callable[[onnx.ModelProto], None], tmp_path: Path
) -> None:
    model = edited(exported)
    plant(model)
    with pytest.raises(AssertionError):
        check_clean(model, tmp_path / "g.onnx")


def test_hazard_10_frozen_reshape_does_not_enter_a_bundle(exported: onnx.ModelProto, tmp_path: Path) -> None:
    model = edited(exported)
    plant_fixed_reshape(model)
    onnx.save(model, tmp_path / "g.onnx")
    spec = classifier_gradient_spec(small_classifier("attention").config)
    with pytest.raises(ExportError, match=f"fixed to the traced batch of {EXAMPLE_BATCH}"):
        check_graph(tmp_path / "g.onnx", spec, example_batch=EXAMPLE_BATCH)
