"""Further outputs, products with Jacobians and Hessians of whole modules, beside float64 autograd."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import onnx
import pytest
import torch
from goldens import relative_error
from onnx_graphs import LogProb, run, session, small_classifier
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from admtrt import export_hessian_vector, export_input_gradient, export_vector_jacobian
from admtrt.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOLERANCE = 1e-5
BATCHES = (3, 1, 4)


class Smooth(nn.Module):
    """Convolutions, group and layer norm, attention, SiLU, GELU, Softplus, tanh: images to logits [N, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.groups, self.layer = nn.GroupNorm(2, 8), nn.LayerNorm(8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.gelu(self.second(F.silu(self.groups(self.first(x)))))
        tokens = self.layer(F.softplus(h).flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).reshape(-1, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)
        tokens = tokens + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(tokens.tanh()).mean(1), tokens


@pytest.fixture(scope="module")
def smooth() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Smooth().eval()


def first_class(out: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
    return out[0].log_softmax(1)[:, 0]


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 2, 6, 6, generator=torch.Generator().manual_seed(batch + seed))


def by_autograd(
    scalar: Callable[..., Tensor], x: Tensor, vector: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The gradient in float64, and its product with a vector by a second derivative."""
    leaf = x.double().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        (grad,) = torch.autograd.grad(scalar(leaf).sum(), leaf, create_graph=True)
        if vector is None:
            return grad.detach(), None
        (product,) = torch.autograd.grad(grad, leaf, vector.double())
    return grad.detach(), product


def test_further_outputs_share_the_forward_pass(smooth: nn.Module, tmp_path: Path) -> None:
    both, alone = tmp_path / "both.onnx", tmp_path / "alone.onnx"
    made = export_input_gradient(
        smooth, {"x": images(2)}, both, scalar=first_class, further=("logits", "tokens")
    )
    assert made.outputs == ("grad", "value", "logits", "tokens")
    plain = export_input_gradient(smooth, {"x": images(2)}, alone, scalar=first_class)
    assert plain.outputs == ("grad", "value")
    assert made.nodes == plain.nodes
    opened = session(onnx.load(both))
    for batch in BATCHES:
        x = images(batch, 5)
        found = run(opened, x=x)
        logits, tokens = smooth(x)
        assert relative_error(found["logits"], logits.detach()) <= TOLERANCE
        assert relative_error(found["tokens"], tokens.detach()) <= TOLERANCE
        double = copy.deepcopy(smooth).double()
        grad, _ = by_autograd(lambda leaf, double=double: first_class(double(leaf)), x)
        assert relative_error(found["grad"], grad) <= TOLERANCE


class Energy(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.square().sum(1), x.sin()


def test_a_module_that_returns_its_scalar_first(tmp_path: Path) -> None:
    made = export_input_gradient(
        Energy().eval(), {"x": torch.zeros(2, 4)}, tmp_path / "g.onnx", further=("sine",)
    )
    assert made.outputs == ("grad", "value", "sine")
    x = torch.randn(3, 4)
    found = run(onnx.load(tmp_path / "g.onnx"), x=x)
    assert relative_error(found["grad"], 2 * x) <= 1e-6
    assert relative_error(found["sine"], x.sin()) <= 1e-6


def test_vector_jacobian_of_any_output(smooth: nn.Module, tmp_path: Path) -> None:
    made = export_vector_jacobian(
        smooth, {"x": images(2)}, tmp_path / "g.onnx", outputs=("logits", "tokens"), of="tokens"
    )
    assert made.inputs == ("x", "cotangent")
    assert made.outputs == ("grad", "logits", "tokens")
    opened, double = session(onnx.load(tmp_path / "g.onnx")), copy.deepcopy(smooth).double()
    for batch in BATCHES:
        x, cotangent = images(batch, 7), torch.randn(batch, 9, 8)
        grad, _ = by_autograd(lambda leaf, cotangent=cotangent: (double(leaf)[1] * cotangent).sum((1, 2)), x)
        found = run(opened, x=x, cotangent=cotangent)
        assert relative_error(found["grad"], grad) <= TOLERANCE
        assert relative_error(found["tokens"], smooth(x)[1].detach()) <= TOLERANCE


def test_hessian_vector(smooth: nn.Module, tmp_path: Path) -> None:
    made = export_hessian_vector(
        smooth, {"x": images(2)}, tmp_path / "g.onnx", scalar=first_class, further=("logits", "tokens")
    )
    assert made.inputs == ("x", "vector")
    assert made.outputs == ("product", "grad", "value", "logits", "tokens")
    opened, double = session(onnx.load(tmp_path / "g.onnx")), copy.deepcopy(smooth).double()
    for batch in BATCHES:
        x, vector = images(batch, 11), images(batch, 13)
        grad, product = by_autograd(lambda leaf: first_class(double(leaf)), x, vector)
        found = run(opened, x=x, vector=vector)
        assert relative_error(found["product"], product) <= TOLERANCE
        assert relative_error(found["grad"], grad) <= TOLERANCE


def test_hessian_vector_of_a_classifier(tmp_path: Path) -> None:
    """Of log p(y | x_t, t) of an ADM classifier, at other t and y than the example's."""
    module = LogProb(small_classifier("attention")).eval()
    example = {"x": torch.zeros(2, 3, 8, 8), "t": torch.zeros(2), "y": torch.zeros(2, dtype=torch.int64)}
    export_hessian_vector(module, example, tmp_path / "g.onnx")
    opened, double = session(onnx.load(tmp_path / "g.onnx")), copy.deepcopy(module).double()
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(batch)
        x, vector = torch.randn(2, batch, 3, 8, 8, generator=generator)
        t, y = torch.rand(batch, generator=generator) * 1000, torch.arange(batch) % 5
        _, product = by_autograd(lambda leaf, t=t, y=y: double(leaf, t.double(), y), x, vector)
        found = run(opened, x=x, t=t, y=y, vector=vector)["product"]
        assert relative_error(found, product) <= TOLERANCE


X = {"x": torch.ones(2, 4)}
LINEAR = nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("export", "module", "options", "message"),
    [
        (export_input_gradient, Energy(), {}, "returns 2 tensors; expected 1: value"),
        (
            export_input_gradient, Energy(), {"further": ("a", "b")},
            "returns 2 tensors; expected 3: value, a, b",
        ),
        (export_input_gradient, Energy(), {"further": ("x",)}, "output cannot be called 'x'"),
        (export_input_gradient, Energy(), {"further": ("grad",)}, "cannot be called 'grad'"),
        (export_vector_jacobian, LINEAR, {"of": "logits"}, r"no output 'logits'; the outputs are \['out'\]"),
        (export_vector_jacobian, LINEAR, {"outputs": ()}, "no output ''"),
        (export_vector_jacobian, LINEAR, {"cotangent": "x"}, "an input cannot be called 'x'"),
        (export_vector_jacobian, LINEAR, {"wrt": "z"}, r"no input 'z'"),
        (export_hessian_vector, LINEAR, {}, r"the scalar has shape \[N,3\]"),
        (
            export_hessian_vector, LINEAR, {"scalar": lambda out, x: out.relu().sum(1)},
            r"Hessian of the scalar is 0 everywhere(.|\n)*SiLU",
        ),
        (export_hessian_vector, LINEAR, {"scalar": lambda out, x: out.sum(1)}, "Hessian of the scalar is 0"),
        (
            export_hessian_vector, LINEAR, {"scalar": lambda out, x: (out.sin() * F.hardsigmoid(out)).sum(1)},
            r"hardsigmoid_backward is not implemented(.|\n)*check=False",
        ),
    ],
)  # fmt: skip
def test_refusals(
    export: Any, module: nn.Module, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "g.onnx"
    with pytest.raises(ExportError, match=message):
        export(module.eval(), X, path, **options)
    assert not list(tmp_path.iterdir())


class HeldBack(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * x.detach()).sum(1)


def test_what_autograd_holds_back_is_refused_in_every_order(tmp_path: Path) -> None:
    for export in (export_vector_jacobian, export_hessian_vector):
        with pytest.raises(ExportError, match="is not the module"):
            export(HeldBack().eval(), X, tmp_path / "g.onnx")
    assert not list(tmp_path.iterdir())
