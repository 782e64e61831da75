"""The goldens of guides by a loss and of references: networks, losses, inputs and stored numbers.

Made with the public code of DPS, guided-diffusion and Universal-Guided-Diffusion, by the recipe of
:mod:`goldens` with a separate salt. Final states are float64; of intermediate states every second row and
column is stored.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from goldens import arrays, metadata, unet_config
from torch import Tensor, nn
from torch.nn import functional as F

from admtrt.bundle import Bundle
from admtrt.config import DiffusionConfig, UNetConfig
from admtrt.export.guides.guide import AnyGuide, Guide, Reference
from admtrt.export.guides.losses import linear
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.models.checkpoint import CheckpointConfig, LoadedNetwork
from admtrt.models.generated import generate_weights, standard_normal
from admtrt.models.unet import UNet

META = metadata("guides")
SIZE = META["image_size"]
EVENT = (3, SIZE, SIZE)
PROCESS = DiffusionConfig(variance_type="learned_range")
OPERATORS = {"inpainting": "identity", "super_resolution": "sr:2", "gaussian_blur": "blur:1.5:9"}


def normal(name: str, count: int = 2) -> np.ndarray:
    """Generated noise, initial state or image, float32 [N, 3, S, S]."""
    return standard_normal(f"input:{name}", (count, *EVENT), META["salt"])


def stored(name: str) -> np.ndarray:
    """Numbers stored from the public code."""
    return arrays("guides")[name]


class _PooledSquares(nn.Module):
    """The loss of Universal Guidance's goldens."""

    def forward(self, x0: Tensor, small: Tensor) -> Tensor:
        return (F.avg_pool2d(x0, 2) - small).square().sum((1, 2, 3))


def _guides(name: str) -> list[AnyGuide]:
    if name == "cond":
        return [Reference("null")]
    pooled = Guide(
        "pooled", _PooledSquares(), {"small": (3, SIZE // 2, SIZE // 2)}, place="before_clip", clip=False
    )
    return [linear(EVENT), pooled] if name == "plain" else [linear(EVENT)]


def loaded(name: str) -> LoadedNetwork:
    """One of the UNets, as a loaded network."""
    config = unet_config(META["unets"][name])
    if name == "cond":
        config = UNetConfig.from_dict(config.to_dict() | {"null_class": META["cfg.ddpm"]["null"]})
    module = UNet(config)
    generate_weights(module, f"{META['salt']}{name}:")
    fields = {"kind": "unet", "unet": config.to_dict(), "diffusion": PROCESS.to_dict()}
    return LoadedNetwork(
        module=module.eval().requires_grad_(False), config=CheckpointConfig.from_dict(fields)
    )


@cache
def bundle(name: str) -> Bundle:
    """The bundle of a UNet with its guides, exported once."""
    path = Path(tempfile.mkdtemp(prefix="admtrt-tests-")) / name
    bundle_from_checkpoints(loaded(name), None, path, guides=_guides(name))
    return Bundle.open(path)
