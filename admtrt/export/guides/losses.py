"""Built-in losses of an image x0, [N, C, H, W], and their targets."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from admtrt.errors import LossError
from admtrt.export.guides.guide import Guide


def _norm(residual: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(residual.flatten(1), dim=1)
    return norm


class Linear(nn.Module):
    """|| measurement - mask * (rows x0 columns') ||: masks, resizing and separable blurs as targets."""

    def forward(self, x0: Tensor, measurement: Tensor, mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The norm, [N]."""
        return _norm(measurement - mask * (rows[:, None] @ x0 @ columns[:, None].mT))


class Convolution(nn.Module):
    """|| measurement - mask * (kernel correlated with x0) ||, borders mirrored without repeating the edge.

    Args:
        kernel: [k, l], odd sizes, the same for every channel.
        channels: of the images.
    """

    kernel: Tensor

    def __init__(self, kernel: Tensor, channels: int) -> None:
        super().__init__()
        if kernel.dim() != 2 or any(size % 2 == 0 for size in kernel.shape):
            raise LossError(
                f"the kernel of a convolution has the sizes {list(kernel.shape)}; expected two odd ones"
            )
        self.pad = [kernel.shape[1] // 2] * 2 + [kernel.shape[0] // 2] * 2
        self.register_buffer("kernel", kernel.float().expand(channels, 1, *kernel.shape).contiguous())

    def forward(self, x0: Tensor, measurement: Tensor, mask: Tensor) -> Tensor:
        """The norm, [N]."""
        padded = F.pad(x0, self.pad, mode="reflect") if any(self.pad) else x0
        return _norm(measurement - mask * F.conv2d(padded, self.kernel, groups=len(self.kernel)))


class TotalVariation(nn.Module):
    """Sum of the squared differences of neighbours."""

    def forward(self, x0: Tensor) -> Tensor:
        """The sum, [N]."""
        across, down = x0[..., 1:] - x0[..., :-1], x0[..., 1:, :] - x0[..., :-1, :]
        return across.square().sum((1, 2, 3)) + down.square().sum((1, 2, 3))


class Range(nn.Module):
    """Mean squared distance of values from [-1, 1]."""

    def forward(self, x0: Tensor) -> Tensor:
        """The mean, [N]."""
        return (x0 - x0.clamp(-1, 1)).square().mean((1, 2, 3))


class Fourier(nn.Module):
    """|| measurement - mask * |F x0| ||: magnitudes of the discrete Fourier transform, orthonormal.

    The transform is two matrix products, because engines lack a DFT operator.

    Args:
        height, width: of the images.
    """

    rows_cos: Tensor
    rows_sin: Tensor
    columns_cos: Tensor
    columns_sin: Tensor

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        for axis, size in (("rows", height), ("columns", width)):
            places = torch.arange(size, dtype=torch.float64)
            angles = 2 * math.pi * torch.outer(places, places).remainder(size) / size
            for part, values in (("cos", angles.cos()), ("sin", angles.sin())):
                self.register_buffer(f"{axis}_{part}", (values / math.sqrt(size)).float())

    def forward(self, x0: Tensor, measurement: Tensor, mask: Tensor) -> Tensor:
        """The norm, [N]."""
        real, imaginary = self.rows_cos @ x0, self.rows_sin @ x0
        a = real @ self.columns_cos - imaginary @ self.columns_sin
        b = real @ self.columns_sin + imaginary @ self.columns_cos
        return _norm(measurement - mask * (a.square() + b.square() + 1e-12).sqrt())


def linear(event: tuple[int, ...], name: str = "linear") -> Guide:
    """The guide ``linear``."""
    channels, height, width = event
    targets = {
        "measurement": (channels, height, width),
        "mask": (1, height, width),
        "rows": (height, height),
        "columns": (width, width),
    }
    return Guide(name, Linear(), targets, kind="linear")


def convolution(event: tuple[int, ...], kernel: Tensor, name: str = "convolution") -> Guide:
    """The guide ``convolution``."""
    channels, height, width = event
    targets = {"measurement": (channels, height, width), "mask": (1, height, width)}
    return Guide(name, Convolution(kernel, channels), targets, kind="convolution")


def fourier(event: tuple[int, ...], name: str = "fourier") -> Guide:
    """The guide ``fourier``."""
    channels, height, width = event
    targets = {"measurement": (channels, height, width), "mask": (1, height, width)}
    return Guide(name, Fourier(height, width), targets, kind="fourier")


def total_variation(event: tuple[int, ...], name: str = "tv") -> Guide:  # noqa: ARG001 - one signature for all
    """The guide ``tv``."""
    return Guide(name, TotalVariation(), kind="tv")


def value_range(event: tuple[int, ...], name: str = "range") -> Guide:  # noqa: ARG001 - as above
    """The guide ``range``, on the unclipped x_0: a clipped one would never leave the range."""
    return Guide(name, Range(), kind="range", clip=False)
