"""Modules for gradient_table.py: what a case is, and how its weights and inputs are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    Draw = Callable[[int, torch.Generator], Tensor]
    Scalar = Callable[..., Tensor]
    Factory = Callable[[], "Case"]

EXAMPLE = 2  # samples of the batch that is traced


@dataclass
class Case:
    """A module, how each of its inputs is drawn, and the scalar to differentiate (None: its output)."""

    module: nn.Module
    draws: dict[str, Draw]
    scalar: Scalar | None = None
    wrt: str = "x"

    def __post_init__(self) -> None:
        self.module.eval()

    def inputs(self, batch: int, seed: int) -> dict[str, Tensor]:
        """Inputs of every name, with the batch as their first axis."""
        generator = torch.Generator().manual_seed(seed)
        return {name: draw(batch, generator) for name, draw in self.draws.items()}


class Calls(nn.Module):
    """A function of the inputs, with the modules whose weights it uses."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The function's result."""
        return self.function(*self.parts, *inputs)


def normal(*shape: int, scale: float = 1.0) -> Draw:
    """Normal numbers [N, *shape]."""
    return lambda batch, generator: scale * torch.randn(batch, *shape, generator=generator)


def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Draw:
    """Uniform numbers [N, *shape]."""
    return lambda batch, generator: low + (high - low) * torch.rand(batch, *shape, generator=generator)


def integers(below: int, *shape: int) -> Draw:
    """Integers [N, *shape] from 0."""
    return lambda batch, generator: torch.randint(below, (batch, *shape), generator=generator)


def disturbed(module: nn.Module) -> nn.Module:
    """Random weights where modules begin with equal numbers, so that no path is dead or trivial."""
    generator = torch.Generator().manual_seed(1)

    def noise(values: Tensor) -> Tensor:
        return torch.randn(values.shape, generator=generator)

    with torch.no_grad():
        for name, values in (*module.named_parameters(), *module.named_buffers()):
            if name.endswith("running_var"):
                values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
            elif name.endswith("running_mean"):
                values.copy_(0.1 * noise(values))
            elif isinstance(values, nn.Parameter) and values.is_floating_point():
                if (values == 0).all():
                    values.copy_(0.1 * noise(values))
                elif values.numel() > 1 and (values == values.flatten()[0]).all():
                    values.add_(0.1 * noise(values) * values.abs().mean())
    return module


def images(module: nn.Module, size: int, scalar: Scalar, channels: int = 3) -> Case:
    """A network of normal images [N, C, size, size]."""
    return Case(disturbed(module), {"x": normal(channels, size, size)}, scalar)


def labelled(module: nn.Module, size: int, classes: int = 1000, channels: int = 3) -> Case:
    """A classifier of images; the scalar is log p of a label."""
    draws = {"x": normal(channels, size, size), "y": integers(classes)}
    return Case(Calls(_first_argument, disturbed(module)), draws, _log_p)


def energy(out: Tensor, *_: Tensor) -> Tensor:
    """Mean square of an output."""
    return out.square().flatten(1).mean(1)


def _first_argument(module: nn.Module, x: Tensor, _: Tensor) -> Tensor:
    out: Tensor = module(x)
    return out


def _log_p(scores: Tensor, _: Tensor, y: Tensor) -> Tensor:
    return scores.log_softmax(1).gather(1, y[:, None])[:, 0]
