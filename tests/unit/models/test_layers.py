"""Layers of the networks, held to PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from admtrt.config import UNetConfig
from admtrt.models.layers import group_norm

CONFIG = UNetConfig(
    image_size=8, model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=()
)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels"])
def test_group_norm_is_pytorchs_in_either_layout(layout: torch.memory_format) -> None:
    """Values, gradients and the layout, in bf16 as well; one, two and three channels a group."""
    generator = torch.Generator().manual_seed(0)
    for channels in (32, 64, 96):
        ours, theirs = group_norm(channels, CONFIG), nn.GroupNorm(32, channels)
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            parameter.data = other.data = torch.randn(channels, generator=generator)
        x = torch.randn(2, channels, 5, 3, generator=generator)
        for dtype in (torch.float32, torch.bfloat16):
            found, expected = (
                x.to(dtype, memory_format=memory).clone().requires_grad_()
                for memory in (layout, torch.contiguous_format)
            )
            made, wanted = ours.to(dtype)(found), theirs.to(dtype)(expected)
            assert made.is_contiguous(memory_format=layout)
            assert torch.equal(made, wanted)
            made.square().sum().backward()
            wanted.square().sum().backward()
            torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=0)
