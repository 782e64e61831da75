"""The public exporter of input gradients on modules that have nothing to do with ADM."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from goldens import relative_error
from onnx_graphs import Function, op_types, run, session
from torch import Tensor, nn
from torch.nn import functional as F

from admtrt.errors import ExportError, OutputError
from admtrt.export.gradient import export_input_gradient

if TYPE_CHECKING:
    from collections.abc import Callable

TOLERANCE = 1e-5


class Attention(nn.Module):
    """Tokens [N, 5, 8] -> [N, 3], by fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.head = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).reshape(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + mixed).mean(dim=1)


class TwoInputs(nn.Module):
    """An energy of a state and a condition, [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, state: Tensor, condition: Tensor) -> Tensor:
        return (self.linear(state).tanh() * condition).sum(dim=1)


class Cosine(nn.Module):
    """A CLIP-like similarity of normalised features, [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(12, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        a = nn.functional.normalize(self.image(x.flatten(1)), dim=-1)
        b = nn.functional.normalize(self.text(text), dim=-1)
        return (a * b).sum(dim=-1)


class Variants(nn.Module):
    """Layers that forks use instead of ADM's: images [N, 4, 6, 6] -> [N, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Conv2d(4, 16, 3), nn.Conv2d(4, 8, 3, stride=2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.pixel_shuffle(F.mish(self.up(x)), 2)  # [N, 4, 8, 8]
        h = F.hardswish(h + F.elu(h.flip(3)[:, :, ::2].repeat(1, 1, 2, 1)))
        h = torch.maximum(h, F.selu(-h).roll(1, 2)).clamp(-2.5, 2.5)
        h = F.gelu(self.down(h), approximate="tanh")
        h = F.hardsigmoid(h) * h - h.amax((2, 3), keepdim=True) + F.pixel_unshuffle(h[:, :, 1:, 1:], 2).sum()
        return self.head(torch.tril(h).mean((2, 3)))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
        return module.eval()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.2),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.ConvTranspose2d(8, 4, 4, 2, 1),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


def log_prob_of_first(out: Tensor, *inputs: Tensor) -> Tensor:
    return out.log_softmax(dim=1)[:, 0]


def inputs_of(batch: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {name: torch.randn(batch, *shape, generator=generator) for name, shape in shapes.items()}


MODULES = {
    "mlp": (mlp, {"x": (4,)}, log_prob_of_first, "x"),
    "cnn": (cnn, {"x": (3, 8, 8)}, log_prob_of_first, "x"),
    "pooled": (pooled, {"x": (3, 8, 8)}, log_prob_of_first, "x"),
    "attention": (Attention, {"x": (5, 8)}, log_prob_of_first, "x"),
    "variants": (Variants, {"x": (4, 6, 6)}, log_prob_of_first, "x"),
    "energy": (TwoInputs, {"state": (4,), "condition": (6,)}, None, "state"),
    "energy of the other input": (TwoInputs, {"state": (4,), "condition": (6,)}, None, "condition"),
    "cosine": (Cosine, {"x": (3, 2, 2), "text": (4,)}, None, "x"),
    "regularised": (mlp, {"x": (4,)}, lambda out, x: -(out**2).sum(dim=1) - (x**2).sum(dim=1).sqrt(), "x"),
}


@pytest.mark.parametrize(
    ("name", "conv_backward"), [*((name, "flipped") for name in MODULES), ("cnn", "transposed")]
)
def test_equals_autograd_at_any_batch_size(name: str, conv_backward: Any, tmp_path: Path) -> None:
    build, shapes, scalar, wrt = MODULES[name]
    module = seeded(build)
    path = tmp_path / "deep" / "g.onnx"
    made = export_input_gradient(
        module, inputs_of(2, shapes), path, wrt=wrt, scalar=scalar, conv_backward=conv_backward
    )
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    written = path.read_bytes()
    assert b"stack_trace" not in written  # with paths of this machine
    assert str(Path(__file__).parent).encode() not in written
    assert (made.path, made.nodes) == (path, len(graph.graph.node))
    assert made.inputs == tuple(value.name for value in graph.graph.input) == tuple(shapes)
    assert made.outputs == tuple(value.name for value in graph.graph.output) == ("grad", "value")
    opened = session(graph)
    for batch in (1, 3):
        feeds = inputs_of(batch, shapes)
        leaves = {key: tensor.clone().requires_grad_(key == wrt) for key, tensor in feeds.items()}
        value = module(*leaves.values())
        value = value if scalar is None else scalar(value, *leaves.values())
        (expected,) = torch.autograd.grad(value.sum(), leaves[wrt])
        out = run(opened, **feeds)
        assert relative_error(out["grad"], expected) <= TOLERANCE
        assert relative_error(out["value"], value.detach()) <= TOLERANCE


def test_a_zero_feature_has_the_gradient_of_pytorch(tmp_path: Path) -> None:
    """normalize() divides by max(norm, eps); at 0 the norm's own gradient must not be 0 / 0."""
    module = seeded(Cosine)
    with torch.no_grad():
        module.image.bias.zero_()
    x, text = torch.zeros(2, 3, 2, 2), torch.ones(2, 4)
    export_input_gradient(module, {"x": x, "text": text}, tmp_path / "g.onnx")
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(leaf, text).sum(), leaf)
    assert relative_error(run(onnx.load(tmp_path / "g.onnx"), x=x, text=text)["grad"], expected) <= TOLERANCE


def test_conv_backward_and_opset_are_heeded(tmp_path: Path) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3)
    ).eval()
    example = {"x": torch.randn(2, 3, 4, 4)}
    found = {}
    for conv_backward, opset in (("flipped", 18), ("transposed", 21)):
        path = tmp_path / f"{conv_backward}.onnx"
        export_input_gradient(
            module, example, path, scalar=log_prob_of_first, conv_backward=conv_backward, opset=opset
        )
        graph = onnx.load(path)
        found[conv_backward] = op_types(graph)
        assert graph.opset_import[0].version == opset
        leaf = example["x"].clone().requires_grad_()
        (expected,) = torch.autograd.grad(log_prob_of_first(module(leaf)).sum(), leaf)
        assert relative_error(run(graph, **example)["grad"], expected) <= TOLERANCE
    assert "ConvTranspose" not in found["flipped"]
    assert "ConvTranspose" in found["transposed"]
    assert "GroupNormalization" in found["transposed"]


def test_example_values_do_not_matter(tmp_path: Path) -> None:
    module = seeded(mlp)
    for name, example in (("zeros", torch.zeros(2, 4)), ("normal", torch.randn(5, 4))):
        export_input_gradient(module, {"x": example}, tmp_path / name, scalar=log_prob_of_first)
    x = torch.randn(3, 4)
    first, second = (run(onnx.load(tmp_path / name), x=x)["grad"] for name in ("zeros", "normal"))
    np.testing.assert_array_equal(first, second)


class Frozen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[torch.arange(len(x))].sum(dim=1)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(dim=1) if x.sum() > 0 else -x.sum(dim=1)


class Determinant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.det(x.sum((1, 2))[:, None, None] * torch.ones(17, 17))


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.scatter_reduce(1, torch.zeros_like(x, dtype=torch.int64), x, "amax")


class HeldBack(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * x.detach()).sum(dim=1)


def mean_cross_entropy(out: Tensor) -> Tensor:
    return F.cross_entropy(out, torch.zeros_like(out[:, 0], dtype=torch.int64)) - out[:, 0]


X = {"x": torch.ones(2, 4)}


@pytest.mark.parametrize(
    ("module", "inputs", "options", "message"),
    [
        (nn.Linear(4, 3), X, {}, r"scalar has shape \[N,3\], expected \[N\]"),
        (nn.Linear(4, 3), X, {"scalar": lambda out, x: out.sum()}, r"scalar has shape \[\], expected \[N\]"),
        (
            nn.Linear(4, 3),
            X,
            {"scalar": log_prob_of_first, "wrt": "z"},
            r"no input 'z'; the inputs are \['x'\]",
        ),
        (nn.Linear(4, 3), X, {"scalar": lambda out, x: (out > 0).float().sum(1)}, "does not depend"),
        (nn.Sequential(nn.Linear(4, 3), nn.Dropout()).train(), X, {}, "training mode"),
        (nn.Sequential(nn.Linear(4, 3), nn.Dropout().train()), X, {}, "training mode"),
        (nn.Linear(4, 3), {"x": torch.ones(1, 4)}, {}, r"batch sizes \{'x': 1\}"),
        (
            TwoInputs(),
            {"state": torch.ones(2, 4), "condition": torch.ones(3, 6)},
            {"wrt": "state"},
            "batch sizes",
        ),
        (
            TwoInputs(),
            {"state": torch.ones(2, 4), "condition": torch.ones(())},
            {"wrt": "state"},
            "input 'condition' has no batch axis",
        ),
        (nn.Embedding(9, 3), {"x": torch.ones(2, dtype=torch.int64)}, {}, "torch.int64; only floating-point"),
        (nn.Linear(4, 3), {"x": np.ones((2, 4))}, {}, "'x' is a ndarray; expected a tensor of PyTorch"),
        (
            nn.Sequential(Largest(), Determinant()),
            {"x": torch.ones(2, 5, 4)},
            {},
            r"2 parts of the graph(.|\n)* ScatterElements .* in the module '0'\n.*Det .* in the module '1'",
        ),
        (nn.Linear(4, 3), X, {"scalar": lambda out, x: torch.special.i0(out).sum(1)}, "i0"),
        (nn.Linear(5, 3), X, {"scalar": log_prob_of_first}, "cannot export"),
        (Frozen(), X, {}, r"fixed the input 'x'(.|\n)*scores.gather\(1, y\[:, None\]\) in place of"),
        (Branching(), X, {}, "export"),
        (TwoInputs(), {"x": torch.ones(2, 4), "grad": torch.ones(2, 6)}, {}, "cannot be called 'grad'"),
        (TwoInputs(), {"value": torch.ones(2, 4), "c": torch.ones(2, 6)}, {"wrt": "value"}, "called 'value'"),
        (TwoInputs(), {"": torch.ones(2, 4), "c": torch.ones(2, 6)}, {"wrt": ""}, "called ''"),
        (nn.Linear(4, 3), X, {"scalar": log_prob_of_first, "opset": 17}, "opset 17 is too old"),
        (nn.Linear(4, 3), X, {"scalar": lambda out, x: (out.sum(1), x)}, "returns 2 tensors; expected 1"),
        (
            nn.Linear(4, 3),
            X,
            {"scalar": lambda out, x: mean_cross_entropy(out)},
            r"'SoftmaxCrossEntropyLoss'(.|\n)*gather",
        ),
        (HeldBack(), X, {}, "not the module: 'grad' differs from PyTorch"),
    ],
)
def test_refusals(
    module: nn.Module, inputs: dict[str, Tensor], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if "training" not in message:
        module.eval()
    modes = [part.training for part in module.modules()]
    with pytest.raises(ExportError, match=message):
        export_input_gradient(module, inputs, tmp_path / "g.onnx", **options)
    assert [part.training for part in module.modules()] == modes, "the caller's module is not touched"
    assert not list(tmp_path.iterdir())


def test_without_the_check_gradients_flow_through_what_was_held_back(tmp_path: Path) -> None:
    export_input_gradient(HeldBack().eval(), X, tmp_path / "g.onnx", check=False)
    x = torch.randn(3, 4)
    assert relative_error(run(onnx.load(tmp_path / "g.onnx"), x=x)["grad"], 2 * x) <= TOLERANCE


def test_a_place_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        export_input_gradient(seeded(mlp), X, tmp_path / "file" / "g.onnx", scalar=log_prob_of_first)


def test_the_deviation_of_equal_values_has_no_gradient(tmp_path: Path) -> None:
    module = Function(lambda x: x.std(-1)).eval()
    export_input_gradient(module, {"x": torch.zeros(2, 4)}, tmp_path / "g.onnx")
    found = run(onnx.load(tmp_path / "g.onnx"), x=torch.ones(3, 4))["grad"]
    np.testing.assert_array_equal(found, np.zeros((3, 4), np.float32))


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: F.instance_norm(x).sum((1, 2, 3)), (4, 6, 6)),  # 0 but for rounding
        (lambda x: F.group_norm(x, 2).sin().sum((1, 2)), (4, 1)),  # of two values a group: all but 0
    ],
)
def test_a_gradient_that_cancels_is_no_fault(function: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Only rounding is left, in PyTorch's float32 as well; in float64 the rounding differs."""
    export_input_gradient(Function(function).eval(), {"x": torch.zeros(2, *shape)}, tmp_path / "g.onnx")
    found = run(onnx.load(tmp_path / "g.onnx"), x=torch.randn(3, *shape))["grad"]
    assert np.abs(found).max() < 1e-3


class Certain(nn.Module):
    """A classifier certain of class 3: log p is only rounding there, and in float32 so is 1 - p."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 5))
        with torch.no_grad():
            self.inner[2].bias[3] += 15

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).log_softmax(-1)[:, 3]


def test_a_classifier_that_is_certain_is_no_fault(tmp_path: Path) -> None:
    module, x = Certain().eval(), torch.randn(3, 4)
    export_input_gradient(module, {"x": torch.zeros(2, 4)}, tmp_path / "g.onnx")
    leaf = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(copy.deepcopy(module).double()(leaf).sum(), leaf)
    found = run(onnx.load(tmp_path / "g.onnx"), x=x)["grad"]
    assert relative_error(found, expected.numpy()) <= 1e-4


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.sum(1).detach(), "has no gradient: it is held back"),
        (lambda x: (x * x.detach()).sum(1), "is not the module"),
        (lambda x: (x**0).sum(1), "depends on input 'x' by nothing that has a gradient"),
    ],
)
def test_what_is_refused_leaves_an_earlier_export_alone(
    function: Callable[..., Tensor], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "g.onnx"
    export_input_gradient(Function(lambda x: x.square().sum(1)).eval(), {"x": torch.zeros(2, 4)}, path)
    before = path.read_bytes()
    with pytest.raises(ExportError, match=message):
        export_input_gradient(Function(function).eval(), {"x": torch.ones(2, 4)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_input_that_is_called_as_a_weight(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 3)).eval()
    name = "module.module.0.weight"
    export_input_gradient(
        module, {name: torch.zeros(2, 4)}, tmp_path / "g.onnx", wrt=name, scalar=log_prob_of_first
    )
    x = torch.randn(3, 4)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(leaf).log_softmax(1)[:, 0].sum(), leaf)
    assert relative_error(run(onnx.load(tmp_path / "g.onnx"), **{name: x})["grad"], expected) <= TOLERANCE


def test_an_input_that_is_called_as_a_value_within(tmp_path: Path) -> None:
    module = nn.Linear(4, 3).eval()
    export_input_gradient(
        module, {"linear": torch.zeros(2, 4)}, tmp_path / "g.onnx", wrt="linear", scalar=lambda o, _: o.sum(1)
    )
    found = run(onnx.load(tmp_path / "g.onnx"), linear=torch.zeros(5, 4))
    assert relative_error(found["grad"], module.weight.detach().sum(0).expand(5, 4).numpy()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_exported_unchecked(dtype: torch.dtype, tmp_path: Path) -> None:
    module = nn.Linear(4, 3).to(dtype).eval()
    made = export_input_gradient(
        module, {"x": torch.zeros(2, 4, dtype=dtype)}, tmp_path / "g.onnx", scalar=lambda o, _: o.sum(1)
    )
    assert made.path.is_file()


class RankRaised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 12, 1)
        self.two = nn.Parameter(torch.full((1, 1, 1, 1), 2.0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x).chunk(3, 1)[0] * self.two).squeeze(0).square().sum((1, 2))


def test_a_scale_that_adds_an_axis_is_not_folded(tmp_path: Path) -> None:
    module = RankRaised().eval()
    export_input_gradient(module, {"x": torch.zeros(2, 4, 5)}, tmp_path / "g.onnx")
    x = torch.randn(3, 4, 5)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(leaf).sum(), leaf)
    assert relative_error(run(onnx.load(tmp_path / "g.onnx"), x=x)["grad"], expected.numpy()) <= 1e-5
