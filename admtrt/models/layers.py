"""Building blocks of ADM; attribute names give the state-dict keys of the original checkpoints."""

from __future__ import annotations

import math
from decimal import Context, Decimal
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from admtrt.config import BackboneConfig

MAX_PERIOD = 10_000.0


def embedding_frequencies(count: int, shift: int = 0) -> Tensor:
    """``MAX_PERIOD ** (-i / (count - shift))``, float32 [count] on the CPU: the same bits on every machine.

    The exponents are float32, as in the original: products and quotients are correctly rounded everywhere.
    The exponential is computed with Decimal, which is correctly rounded by its specification; in PyTorch,
    NumPy or C its last bit depends on the processor.
    """
    exponents = (
        np.float32(-math.log(MAX_PERIOD)) * np.arange(count, dtype=np.float32) / np.float32(count - shift)
    )
    wide = Context(prec=30)
    return torch.tensor(
        [float(wide.exp(Decimal(e))) for e in exponents.tolist()], dtype=torch.float32, device="cpu"
    )


class TimestepEmbedding(nn.Module):
    """Sinusoidal embedding of (fractional) timesteps: [N] -> [N, dim], cosines first.

    A module, so that the frequencies are a constant of an exported graph. They are not in the state dict.
    """

    frequencies: Tensor

    def __init__(self, dim: int, shift: int = 0) -> None:
        super().__init__()
        # Not on the meta device: no checkpoint would fill them in.
        self.register_buffer("frequencies", embedding_frequencies(dim // 2, shift), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """Embed ``t`` float32 [N]."""
        angles = t[:, None] * self.frequencies[None]
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class GroupNorm(nn.GroupNorm):
    """PyTorch's group norm, computed in the layout that its CPU kernel is made for.

    On channels-last images with few channels per group, the kernel takes 25 times as long; two copies are
    faster.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W], in any layout."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.is_contiguous():
            return super().forward(x)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


def group_norm(channels: int, config: BackboneConfig) -> nn.GroupNorm:
    """A network's normalisation."""
    return GroupNorm(config.norm_groups, channels, config.norm_eps)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def zeroed(module: nn.Conv2d | nn.Conv1d) -> nn.Conv2d | nn.Conv1d:
    """Zero a layer's parameters, so that its branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then an optional 3x3 convolution."""

    def __init__(self, channels: int, *, use_conv: bool) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2H, 2W]."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Halving by a strided 3x3 convolution or by 2x2 average pooling.

    The convolution pads with zeros on both sides of the image or, with ``after``, only right and below.
    """

    def __init__(self, channels: int, *, use_conv: bool, after: bool = False) -> None:
        super().__init__()
        self.after = after
        self.op: nn.Module = nn.AvgPool2d(2)
        if use_conv:
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if after else 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H/2, W/2]."""
        out: Tensor = self.op(F.pad(x, (0, 1, 0, 1)) if self.after else x)
        return out


class ResBlock(nn.Module):
    """Residual block conditioned on an embedding, optionally up- or downsampling (BigGAN style).

    The embedding enters as scale and shift after the second normalisation (adaptive group norm) or is
    added before it. With ``rescale_residuals`` the sum is multiplied by 1/sqrt(2).
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        out_channels: int,
        config: BackboneConfig,
        *,
        resample: str = "",
    ) -> None:
        super().__init__()
        self.scale_shift_norm = config.scale_shift_norm
        self.rescale = config.rescale_residuals
        self.gradient_checkpointing = False
        self.in_layers = nn.Sequential(
            group_norm(channels, config), nn.SiLU(), conv3x3(channels, out_channels)
        )
        self.resample: nn.Module | None = None
        if resample:
            self.resample = {"up": Upsample, "down": Downsample}[resample](channels, use_conv=False)
        width = 2 * out_channels if config.scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, width))
        self.out_layers = nn.Sequential(
            group_norm(out_channels, config),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            zeroed(conv3x3(out_channels, out_channels)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map x [N, C, H, W] and emb [N, E] -> [N, C', H', W']."""
        if self.gradient_checkpointing and self.training:
            out: Tensor = checkpoint(self._forward, x, emb, use_reentrant=False)
            return out
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = activation(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)
        conditioning = self.emb_layers(emb)[:, :, None, None]
        out_norm, *rest = self.out_layers
        if self.scale_shift_norm:
            scale, shift = conditioning.chunk(2, dim=1)
            h = out_norm(h) * (1 + scale) + shift
        else:
            h = out_norm(h + conditioning)
        for layer in rest:
            h = layer(h)
        out: Tensor = self.skip_connection(x) + h
        return out * math.sqrt(0.5) if self.rescale else out


class SelfAttention(nn.Module):
    """Multi-head self-attention over the positions of packed queries, keys and values.

    The legacy order splits heads first and q, k, v within each head; the new order splits q, k, v first.
    Queries and keys are each scaled by the fourth root of the head size, and the products are written as
    4-D MatMul - Softmax - MatMul, the form that inference engines fuse.
    """

    def __init__(self, heads: int, *, new_order: bool) -> None:
        super().__init__()
        self.heads = heads
        self.new_order = new_order

    def forward(self, qkv: Tensor, queries: int | None = None) -> Tensor:
        """[N, 3C, T] -> [N, C, T], or [N, C, queries] with only the first positions as queries."""
        width, length = qkv.shape[1:]
        size = width // (3 * self.heads)
        if self.new_order:
            parts = tuple(part.reshape(-1, self.heads, size, length) for part in qkv.chunk(3, dim=1))
        else:
            parts = qkv.reshape(-1, self.heads, 3 * size, length).chunk(3, dim=2)
        q, k, v = parts  # each [N, heads, size, T]
        if queries is not None:
            q = q[..., :queries]
        scale = size**-0.25
        weights = torch.softmax((q * scale).transpose(2, 3) @ (k * scale), dim=-1)  # [N, heads, queries, T]
        out = v @ weights.transpose(2, 3)
        return out.reshape(-1, width // 3, out.shape[-1])


class AttentionBlock(nn.Module):
    """Residual self-attention over all positions of a feature map."""

    def __init__(self, channels: int, *, num_heads: int, config: BackboneConfig) -> None:
        super().__init__()
        heads = num_heads if config.num_head_channels is None else channels // config.num_head_channels
        self.gradient_checkpointing = False
        self.norm = group_norm(channels, config)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.attention = SelfAttention(heads, new_order=config.new_attention_order)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        if self.gradient_checkpointing and self.training:
            out: Tensor = checkpoint(self._forward, x, use_reentrant=False)
            return out
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        # On images, not on rows of positions, so that the convolutions' layout can be kept.
        qkv = F.conv2d(self.norm(x), self.qkv.weight[..., None], self.qkv.bias)
        out = self.attention(qkv.flatten(2)).reshape(-1, *x.shape[1:])
        return x + F.conv2d(out, self.proj_out.weight[..., None], self.proj_out.bias)


class AttentionPool(nn.Module):
    """CLIP's pooling: the mean token attends to every position, then a linear map to ``out_features``."""

    def __init__(self, size: int, channels: int, head_channels: int, out_features: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_features, 1)
        self.attention = SelfAttention(channels // head_channels, new_order=True)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, out_features]."""
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1) + self.positional_embedding[None]
        pooled = self.attention(self.qkv_proj(x), queries=1)  # only the mean token's output is used
        out: Tensor = self.c_proj(pooled).flatten(1)
        return out


class Stage(nn.Sequential):
    """A sequence whose residual blocks also receive the embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        """Run every layer in turn."""
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


def set_gradient_checkpointing(module: nn.Module, *, enabled: bool) -> None:
    """Trade computation for memory in every residual and attention block while training."""
    for child in module.modules():
        if isinstance(child, ResBlock | AttentionBlock):
            child.gradient_checkpointing = enabled
