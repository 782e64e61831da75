"""The ADM UNet and its upsampling variant (Dhariwal & Nichol 2021, section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from admtrt.models.layers import (
    AttentionBlock,
    Downsample,
    ResBlock,
    Stage,
    TimestepEmbedding,
    Upsample,
    conv3x3,
    group_norm,
    zeroed,
)

if TYPE_CHECKING:
    from admtrt.config import BackboneConfig, UNetConfig


class Encoder(nn.Module):
    """Time embedding, downsampling path and middle block, shared by the UNet and the classifier."""

    def __init__(self, config: BackboneConfig, in_channels: int) -> None:
        super().__init__()
        self.emb_channels = 4 * config.model_channels
        self.timestep_embedding = TimestepEmbedding(config.model_channels, config.frequency_shift)
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, self.emb_channels),
            nn.SiLU(),
            nn.Linear(self.emb_channels, self.emb_channels),
        )
        channels = config.level_channels[0]
        blocks = [Stage(conv3x3(in_channels, channels))]
        self.stage_channels = [channels]
        last_level = len(config.channel_mult) - 1
        for level, (width, size) in enumerate(zip(config.level_channels, config.level_sizes, strict=True)):
            for _ in range(config.num_res_blocks):
                stage: list[nn.Module] = [ResBlock(channels, self.emb_channels, width, config)]
                channels = width
                if size in config.attention_resolutions:
                    stage.append(AttentionBlock(channels, num_heads=config.num_heads, config=config))
                blocks.append(Stage(*stage))
                self.stage_channels.append(channels)
            if level != last_level:
                blocks.append(Stage(self._downsample(channels, config)))
                self.stage_channels.append(channels)
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = Stage(
            ResBlock(channels, self.emb_channels, channels, config),
            AttentionBlock(channels, num_heads=config.num_heads, config=config),
            ResBlock(channels, self.emb_channels, channels, config),
        )

    def _downsample(self, channels: int, config: BackboneConfig) -> nn.Module:
        if config.resblock_updown:
            return ResBlock(channels, self.emb_channels, channels, config, resample="down")
        after = config.downsample_padding == "after"
        return Downsample(channels, use_conv=config.conv_resample, after=after)

    def embed_time(self, t: Tensor) -> Tensor:
        """Embed t [N] -> [N, 4 * model_channels]."""
        out: Tensor = self.time_embed(self.timestep_embedding(t))
        return out

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """Outputs of every input block in order, and of the middle block last."""
        features = []
        for block in self.input_blocks:
            x = block(x, emb)
            features.append(x)
        features.append(self.middle_block(x, emb))
        return features


class UNet(Encoder):
    """The ADM UNet; with ``config.low_res_size`` it is the upsampler."""

    def __init__(self, config: UNetConfig) -> None:
        conditioned = 1 if config.low_res_size is None else 2
        super().__init__(config, config.in_channels * conditioned)
        self.config = config
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, self.emb_channels)
        skips = list(self.stage_channels)
        channels = skips[-1]
        heads = config.num_heads_upsample or config.num_heads
        blocks = []
        for level in reversed(range(len(config.channel_mult))):
            width, size = config.level_channels[level], config.level_sizes[level]
            for index in range(config.num_res_blocks + 1):
                stage: list[nn.Module] = [ResBlock(channels + skips.pop(), self.emb_channels, width, config)]
                channels = width
                if size in config.attention_resolutions:
                    stage.append(AttentionBlock(channels, num_heads=heads, config=config))
                if level and index == config.num_res_blocks:
                    stage.append(self._upsample(channels, config))
                blocks.append(Stage(*stage))
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(
            group_norm(channels, config), nn.SiLU(), zeroed(conv3x3(channels, config.out_channels))
        )

    def _upsample(self, channels: int, config: UNetConfig) -> nn.Module:
        if config.resblock_updown:
            return ResBlock(channels, self.emb_channels, channels, config, resample="up")
        return Upsample(channels, use_conv=config.conv_resample)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, low_res: Tensor | None = None) -> Tensor:
        """Predict eps (or the process's ``mean_type``) and, if sigma is learned, the variance channels.

        Args:
            x: [N, C, H, W], the noisy image.
            t: float32 [N], in the units the network was trained with.
            y: int64 [N], labels; required if and only if the network is class-conditional.
            low_res: [N, C, h, w] in [-1, 1]; required if and only if it is an upsampler. Upsampled
                bilinearly.

        Returns:
            [N, C or 2C, H, W].
        """
        emb = self.embed_time(t)
        if (y is None) != (self.config.num_classes is None):
            raise ValueError("labels are given if and only if the network is class-conditional")
        if (low_res is None) != (self.config.low_res_size is None):
            raise ValueError("low_res is given if and only if the network is an upsampler")
        if y is not None:
            emb = emb + self.label_emb(y)
        if low_res is not None:
            size = (self.config.image_size, self.config.image_size)
            x = torch.cat([x, F.interpolate(low_res, size, mode="bilinear", align_corners=False)], dim=1)
        *features, h = self.encode(x, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, features.pop()], dim=1), emb)
        out: Tensor = self.out(h)
        return out
