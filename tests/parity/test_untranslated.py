"""Functions that PyTorch's exporter does not translate, or into others that have no gradient at 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import pytest
import torch
from goldens import relative_error
from onnx_graphs import Function, run
from torch.nn import functional as F

from admtrt.export.gradient import export_hessian_vector, export_input_gradient
from admtrt.export.untranslated import Translated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MASK = torch.ones(5, 5).tril().bool()
EYE = torch.eye(4)


def attention(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of 3 and 5 axes, with masks of 2 and more."""
    attend, rows = F.scaled_dot_product_attention, x[:, 0, 0]
    yield attend(rows, rows.sin(), rows, is_causal=True)
    yield attend(rows, rows, rows, rows[..., :1] * rows[..., None, :, 0])
    yield attend(x, x.sin(), x, x[..., :1] @ x[..., :1].mT)
    yield attend(x, x, x, MASK)


def distances(x: torch.Tensor) -> Iterator[torch.Tensor]:
    yield torch.cdist(x[:, :2], x[:, 1:] + 0.1)
    yield torch.cdist(x, x)
    yield torch.cdist(x, x.flip(1), p=1)
    yield torch.cdist(x, x.flip(1) + 0.1, 3.0)
    yield torch.hypot(x, x.flip(1)[:, :1]) + x.hypot(x + 1)


def ordered(x: torch.Tensor) -> Iterator[torch.Tensor]:
    yield torch.kthvalue(x, 2).values
    yield x.kthvalue(4, 1, True)[0]
    yield x.median(1).values
    yield x.median(2, keepdim=True)[0]
    yield x * torch.searchsorted(x.sort().values, x)
    yield x * torch.searchsorted(torch.arange(4.0), x, right=True)


def multiplied(x: torch.Tensor) -> Iterator[torch.Tensor]:
    yield torch.cumprod(x, -1) + x.cumprod(dim=1)
    kernel = x.mT @ x + EYE
    yield torch.logdet(kernel) + kernel.logdet()
    yield F.rrelu(x)


def pooled(x: torch.Tensor) -> Iterator[torch.Tensor]:
    yield F.adaptive_max_pool2d(x, (3, 5))
    yield F.adaptive_max_pool2d(x, (3, None))
    yield F.adaptive_max_pool1d(x[:, 0], 3)


@pytest.mark.parametrize(
    ("calls", "shape"),
    [
        (attention, (2, 3, 5, 4)),
        (distances, (5, 4)),
        (ordered, (5, 4)),
        (multiplied, (5, 4)),
        (pooled, (2, 7, 8)),
    ],
)
def test_functions(
    calls: Callable[[torch.Tensor], Iterator[torch.Tensor]],
    shape: tuple[int, ...],
    tmp_path: Path,
) -> None:
    def value(x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([part.reshape(part.shape[0], -1) for part in calls(x)], 1)
        return (y * torch.linspace(0.5, 1.5, y.shape[1], dtype=y.dtype)).sin().sum(1)

    generator = torch.Generator().manual_seed(0)
    example = {"x": torch.randn(2, *shape, generator=generator)}
    export_input_gradient(Function(value).eval(), example, tmp_path / "g.onnx")
    graph = onnx.load(tmp_path / "g.onnx")
    for batch in (1, 3):
        x = torch.randn(batch, *shape, generator=generator)
        x = x.round() if calls is pooled and batch > 1 else x  # ties
        leaf = x.double().requires_grad_()
        (expected,) = torch.autograd.grad(value(leaf).sum(), leaf)
        assert relative_error(run(graph, x=x)["grad"], expected) <= 5e-6


def test_a_second_derivative(tmp_path: Path) -> None:
    """Forces between points, whose distances to themselves are 0."""
    energy = Function(lambda x: (torch.cdist(x, x) + EYE).pow(-1).sum((1, 2)).sin())
    export_hessian_vector(energy.eval(), {"x": torch.randn(2, 4, 3)}, tmp_path / "h.onnx", check=False)
    x, vector = torch.randn(3, 4, 3), torch.randn(3, 4, 3)
    apart = 1 - torch.eye(4, dtype=torch.float64)

    def written(points: torch.Tensor) -> torch.Tensor:
        squares = (points[:, :, None] - points[:, None]).square().sum(-1)
        return (apart * (squares + 1 - apart).rsqrt() + 1 - apart).sum((1, 2)).sin().sum()

    expected = torch.autograd.functional.hvp(written, x.double(), vector.double())[1]
    assert (
        relative_error(run(onnx.load(tmp_path / "h.onnx"), x=x, vector=vector)["product"], expected) <= 1e-5
    )


def test_quotients_and_logarithms_at_0(tmp_path: Path) -> None:
    """sinc(0) is 1, not 0 / 0; 0 log y is 0, with the slope log y, but 0 for y = 0."""

    def value(x: torch.Tensor) -> torch.Tensor:
        whole = torch.xlogy(x, torch.ones_like(x) * 3) + torch.xlogy(x * x, x.square())
        return (torch.sinc(x) * torch.tensor([1, 2, 3]) + whole + torch.xlogy(x.relu(), 2.0)).sum(1)

    export_input_gradient(Function(value).eval(), {"x": torch.randn(2, 3)}, tmp_path / "g.onnx")
    x = torch.tensor([[0, 0.5, -1], [0, -2, 0]])
    found = run(onnx.load(tmp_path / "g.onnx"), x=x)
    slope = torch.tensor(3.0).log() + x.sign().clamp_min(0) * torch.tensor(2.0).log()
    slope = slope + torch.where(x == 0, 0, 2 * x * x.square().log() + 2 * x)
    angle = torch.pi * torch.where(x == 0, 1, x)
    sinc = torch.where(x == 0, 0, (angle.cos() * angle - angle.sin()) / angle.square() * torch.pi)
    expected = slope + sinc * torch.tensor([1, 2, 3])
    assert relative_error(found["grad"], expected) <= 5e-6
    assert relative_error(found["value"], value(x)) <= 5e-6


def test_what_pytorch_translates_or_no_one_knows_is_left() -> None:
    x = torch.randn(2, 3, 4, 4)
    with Translated():
        assert F.adaptive_max_pool2d(x, 2, return_indices=True)[1].shape == (2, 3, 2, 2)
        torch.testing.assert_close(F.adaptive_max_pool2d(x, 2), F.max_pool2d(x, 2))
        assert x.median().dim() == 0
        assert torch.searchsorted(torch.arange(3.0), 1.5) == 2
        torch.testing.assert_close(F.rrelu(x, training=True)[x > 0], x[x > 0])
