"""The comparison with autograd: refused and accepted differences; PyTorch's gradients at ties and ends."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from goldens import relative_error
from onnx_graphs import Function, run
from torch import Tensor, nn
from torch.nn import functional as F

from admtrt.errors import ExportError
from admtrt.export.gradient import export_input_gradient

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


def exported(function: Callable[..., Tensor], example: Tensor, path: Path) -> onnx.ModelProto:
    export_input_gradient(Function(function).eval(), {"x": example}, path / "g.onnx")
    return onnx.load(path / "g.onnx")


def by_autograd(function: Callable[..., Tensor], x: Tensor) -> np.ndarray:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0].numpy()


def side_by_side(functions: Sequence[Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """Functions [N, n] -> [N], each applied to its own part of [N, functions, n]: one export for all."""
    return lambda x: sum(function(x[:, index]) for index, function in enumerate(functions))


NEAR_0_AND_1 = [
    lambda x: torch.sqrt(x * x + 1e-8).sum(1),
    lambda x: torch.sqrt(x * x + 1e-12).sum(1),
    lambda x: torch.log(x.abs() + 1e-9).sum(1),
    lambda x: (x / (x.abs() + 1e-8)).sum(1),
    lambda x: ((x * 1.000005 - x) * 1e6).sum(1),
    lambda x: ((x / 1.000005 - x) * 1e6).sum(1),
]


def test_constants_near_0_and_1_stay(tmp_path: Path) -> None:
    """PyTorch's own optimisation takes them for 0 and 1."""
    x = torch.tensor([[2e-9, 1e-6, 1e-5], [-3e-8, 0.5, -2]])[:, None].repeat(1, len(NEAR_0_AND_1), 1)
    function = side_by_side(NEAR_0_AND_1)
    found = run(exported(function, torch.zeros(2, *x.shape[1:]), tmp_path), x=x)["grad"]
    np.testing.assert_allclose(found, by_autograd(function, x), rtol=1e-4)


def detached_quantiser(x: Tensor) -> Tensor:
    z = x**2.2
    z = z + (torch.round(z * 255) / 255 - z).detach()
    return (z - 0.3).square().flatten(1).sum(1)


def test_an_example_whose_neighbours_leave_the_domain_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'grad' differs from PyTorch by 1 of"):
        exported(detached_quantiser, torch.rand(2, 3, 4), tmp_path)
    exported(lambda x: x.log().sum(1), torch.rand(2, 3), tmp_path)
    with pytest.raises(ExportError, match=r"not finite on any row(.|\n)*from the module's domain"):
        exported(lambda x: (x - 1e9).log().sum(1), torch.zeros(2, 3), tmp_path)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: (x + torch.randn_like(x)).sin().sum(1), "draws random numbers"),
        (lambda x: (x * torch.rand(8)).sin().sum(1), "draws random numbers"),
        (lambda x: F.dropout(x, 0.5, training=True).square().sum(1), "'Dropout'"),
        (lambda x: (x * torch.bernoulli(x.sigmoid())).sum(1), "'Bernoulli'"),
        (lambda x: (x * np.random.default_rng().normal()).sin().sum(1), "another result each time"),
    ],
)
def test_randomness_is_refused(function: Callable[..., Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"{message}(.|\n)*as an input"):
        exported(function, torch.zeros(2, 8), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_kink_within_rounding_is_no_fault(tmp_path: Path) -> None:
    """Of 50,000 ReLUs a row, here and there one takes another side than in PyTorch."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers: list[nn.Module] = []
        for channels in (3, 16, 16, 16):
            layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU()]
        module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 28 * 28, 1), nn.Flatten(0)).eval()
        for layer in layers[::2]:
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    export_input_gradient(module, {"x": torch.zeros(2, 3, 28, 28)}, tmp_path / "g.onnx")


NEAR = torch.tensor([[1.0, 1, 0, 1], [0, 0, 0, 0], [-1, 1, 1, -1], [3, -3, 6, 0]])


AT_TIES_AND_ENDS = [
    lambda x: x.max(dim=1).values,
    lambda x: x.min(dim=1).values,
    lambda x: x.amax(1),
    lambda x: torch.linalg.vector_norm(x, 3, dim=1),
    lambda x: torch.linalg.vector_norm(x, 0.5, dim=1),
    lambda x: torch.linalg.vector_norm(x, math.inf, dim=1),
    lambda x: F.normalize(x, p=3.0, dim=1)[:, 0],
    lambda x: F.relu6(x).sum(1),
    lambda x: F.hardtanh(x).sum(1),
    lambda x: F.hardswish(x).sum(1),
    lambda x: F.hardsigmoid(x).sum(1),
    lambda x: x.clamp(-1, 1).sum(1),
    lambda x: x.clamp(1, -1).sum(1) + x.sum(1),
    lambda x: x.clamp_min(0).sum(1),
    lambda x: x.clamp(torch.tensor([-1.0, 0, 1, -1]), torch.tensor(1.0)).sum(1),
    lambda x: x.clamp(x[:, 1:2], x[:, 1:2] + 1).sum(1),
    lambda x: F.relu(x).clamp(max=1).sum(1),
    lambda x: torch.minimum(torch.maximum(x, torch.tensor(-1.0)), torch.tensor(1.0)).sum(1),
]


def test_ties_and_ends_as_in_the_installed_pytorch(tmp_path: Path) -> None:
    x = NEAR[:, None].repeat(1, len(AT_TIES_AND_ENDS), 1)
    function = side_by_side(AT_TIES_AND_ENDS)
    found = run(exported(function, torch.zeros(2, *x.shape[1:]), tmp_path), x=x)["grad"]
    for index, expected in enumerate(np.moveaxis(by_autograd(function, x), 1, 0)):
        assert relative_error(found[:, index], expected) <= 1e-6, index


def test_an_exponent_of_higher_rank(tmp_path: Path) -> None:
    def cubed(x: Tensor) -> Tensor:
        return (x ** torch.full((1, 1, 1), 3.0))[0].sum(1)

    x = torch.rand(3, 4)
    found = run(exported(cubed, torch.rand(2, 4), tmp_path), x=x)["grad"]
    assert relative_error(found, by_autograd(cubed, x)) <= 1e-6
