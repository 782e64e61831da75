"""The judge's network: a small residual network with batch normalisation."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from pathlib import Path

FEATURES = 128
"""Channels of the coarsest level, each of which gives one feature."""
_NARROWEST = 32
_COARSEST = 8  # no further level from this size on
_LEVELS = 2  # at least


class Judge(nn.Module):
    """uint8 images [N, H, W, C] to features [N, 128] and logits [N, classes].

    Every level halves the size, the first at once, since full resolution is where a convolution costs most.
    """

    def __init__(self, image_size: int, channels: int, classes: int) -> None:
        super().__init__()
        self.image_size, self.channels = image_size, channels
        widths = judge_widths(image_size)
        layers: list[nn.Module] = [*_conv(channels, widths[0], kernel=5), _Residual(widths[0])]
        for narrow, wide in pairwise(widths):
            layers += [*_conv(narrow, wide, kernel=3), _Residual(wide)]
        self.body = nn.Sequential(*layers)
        self.last = nn.Linear(widths[-1], classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on CPUs

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``pool`` and ``logits``."""
        return self.features(images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``pool`` and ``logits`` of x [N, C, H, W] in [-1, 1]."""
        pooled = self.body(x).mean(dim=(2, 3))
        return pooled, self.last(pooled)

    def save(self, path: Path) -> None:
        """Write the weights as safetensors."""
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, path)


def judge_widths(image_size: int) -> list[int]:
    """Channels of the levels, from the first, of half the image's size, to the last, of 128 channels."""
    levels = _LEVELS
    while -(-image_size >> levels) > _COARSEST:
        levels += 1
    return [max(_NARROWEST, FEATURES >> level) for level in reversed(range(levels))]


class _Residual(nn.Module):
    """Two convolutions around a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(*_conv(width, width, kernel=3, stride=1), *_conv(width, width, 3, 1)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.inner(x))


def _conv(narrow: int, wide: int, kernel: int, stride: int = 2) -> list[nn.Module]:
    convolution = nn.Conv2d(narrow, wide, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(wide), nn.ReLU()]
