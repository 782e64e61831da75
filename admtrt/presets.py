"""The published ADM checkpoints: network, process and recommended sampler of each, by file name.

Sources: the released sampling flags, and Dhariwal & Nichol (2021), table 14, for the guidance scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from admtrt.config import ClassifierConfig, DiffusionConfig, SamplerConfig, UNetConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Kind = Literal["unet", "classifier", "upsampler"]
"""What a network is for."""


def network_kind(network: UNetConfig | ClassifierConfig) -> Kind:
    """The kind that a network's configuration describes."""
    if isinstance(network, ClassifierConfig):
        return "classifier"
    return "unet" if network.low_res_size is None else "upsampler"


@dataclass(frozen=True)
class Preset:
    """One published checkpoint; ``name`` is its file name without the suffix.

    A classifier has the process and the sampler of the UNet that it guides.
    """

    name: str
    network: UNetConfig | ClassifierConfig
    diffusion: DiffusionConfig
    sampler: SamplerConfig

    @property
    def kind(self) -> Kind:
        """What the network is for."""
        return network_kind(self.network)


_CHANNEL_MULT = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
_IMAGENET_CLASSES = 1000
_LINEAR, _COSINE = DiffusionConfig(schedule="linear"), DiffusionConfig(schedule="cosine")


def _unet(size: int, **changes: Any) -> UNetConfig:
    shared = {
        "image_size": size,
        "model_channels": 256,
        "channel_mult": _CHANNEL_MULT[size],
        "num_head_channels": 64,
        "resblock_updown": True,
    }
    return UNetConfig.from_dict(shared | changes)


def _published() -> Iterator[Preset]:
    conditional = {"num_classes": _IMAGENET_CLASSES}
    adm_64 = {"model_channels": 192, "num_res_blocks": 3, "new_attention_order": True, "dropout": 0.1}
    for size, scale, diffusion, changes in (
        (64, 1.0, _COSINE, adm_64),
        (128, 0.5, _LINEAR, {"num_head_channels": None}),
        (256, 1.0, _LINEAR, {}),
        (512, 4.0, _LINEAR, {}),
    ):
        sampler = SamplerConfig(scale=scale)
        yield Preset(f"{size}x{size}_diffusion", _unet(size, **conditional, **changes), diffusion, sampler)
        classifier = ClassifierConfig(
            image_size=size,
            channel_mult=_CHANNEL_MULT[size],
            num_res_blocks=4 if size == 64 else 2,
            num_classes=_IMAGENET_CLASSES,
        )
        yield Preset(f"{size}x{size}_classifier", classifier, diffusion, sampler)
    yield Preset("256x256_diffusion_uncond", _unet(256), _LINEAR, SamplerConfig(scale=10.0))

    unguided = SamplerConfig(scale=0.0)
    upsampler = conditional | {"model_channels": 192, "channel_mult": _CHANNEL_MULT[256]}
    to_256 = _unet(256, **upsampler, low_res_size=64, num_head_channels=None)
    to_512 = _unet(512, **upsampler, low_res_size=128, attention_resolutions=(32, 16))
    yield Preset("64_256_upsampler", to_256, _LINEAR, unguided)
    yield Preset("128_512_upsampler", to_512, _LINEAR, unguided)

    # LSUN's samples keep improving up to all of the 1000 steps.
    every_step = SamplerConfig(steps="1000", scale=0.0)
    for name, dropout in (("bedroom", 0.1), ("cat", 0.1), ("horse", 0.1), ("horse_nodropout", 0.0)):
        yield Preset(f"lsun_{name}", _unet(256, dropout=dropout), _LINEAR, every_step)


PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _published()})
"""Every published checkpoint by name."""
