"""The noisy classifier: the UNet's encoder with one of four pooling heads (Dhariwal & Nichol, section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from admtrt.models.layers import AttentionPool, group_norm, zeroed
from admtrt.models.unet import Encoder

if TYPE_CHECKING:
    from admtrt.config import ClassifierConfig

_HIDDEN, _GROUPS = 2048, 32  # width of the two spatial heads; groups of the second, whatever norm_groups is


class Classifier(Encoder):
    """p(y | x_t, t) as logits."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config, config.in_channels)
        self.config = config
        channels, size = config.level_channels[-1], config.level_sizes[-1]
        features = sum(self.stage_channels) + channels
        if config.pool == "adaptive":
            self.out = nn.Sequential(
                group_norm(channels, config),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d((1, 1)),
                zeroed(nn.Conv2d(channels, config.num_classes, 1)),
                nn.Flatten(),
            )
        elif config.pool == "attention":
            assert config.num_head_channels is not None  # the configuration guarantees it
            self.out = nn.Sequential(
                group_norm(channels, config),
                nn.SiLU(),
                AttentionPool(size, channels, config.num_head_channels, config.num_classes),
            )
        elif config.pool == "spatial":
            self.out = nn.Sequential(
                nn.Linear(features, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, config.num_classes)
            )
        else:
            self.out = nn.Sequential(
                nn.Linear(features, _HIDDEN),
                nn.GroupNorm(_GROUPS, _HIDDEN),
                nn.SiLU(),
                nn.Linear(_HIDDEN, config.num_classes),
            )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Map x [N, C, H, W] and t float32 [N] -> logits [N, classes]."""
        features = self.encode(x, self.embed_time(t))
        if self.config.pool.startswith("spatial"):
            pooled = torch.cat([feature.mean(dim=(2, 3)) for feature in features], dim=-1)
        else:
            pooled = features[-1]
        out: Tensor = self.out(pooled)
        return out


def log_prob(classifier: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """log p(y | x_t, t) of each sample, [N]. The label is used in a one-hot product, not as an index."""
    logits = classifier(x, t)
    one_hot = F.one_hot(y, logits.shape[1]).to(logits.dtype)
    return (F.log_softmax(logits, dim=-1) * one_hot).sum(dim=-1)


def log_prob_gradient(classifier: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """d log p(y | x_t, t) / dx_t of each sample by autograd, [N, C, H, W]: the exported graph's reference."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(log_prob(classifier, x, t, y).sum(), x)
    return gradient
