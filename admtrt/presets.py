"""The published ADM checkpoints: network, process and recommended sampler of each, by file name.

Sources: the released sampling flags, and Dhariwal & Nichol (2021), table 14, for the guidance scales. Sizes
and costs are written here so that listing them needs no PyTorch; a test recomputes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from admtrt.config import ClassifierConfig, DiffusionConfig, EdmConfig, UNetConfig
from admtrt.schedule.sampler import SamplerConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Kind = Literal["unet", "classifier", "upsampler"]
"""Role of a network."""


def network_kind(network: UNetConfig | ClassifierConfig) -> Kind:
    """The kind that a network's configuration describes."""
    if isinstance(network, ClassifierConfig):
        return "classifier"
    return "unet" if network.low_res_size is None else "upsampler"


@dataclass(frozen=True)
class Preset:
    """One published checkpoint; ``name`` is its file name without the suffix.

    A classifier has the process and the sampler of the UNet that it guides.

    Attributes:
        name: file name without the suffix.
        network: its configuration.
        diffusion: the process that it was trained on.
        sampler: the recommended sampler, for the best images.
        fast_sampler: the recommended sampler with 25 steps of DDIM, if the paper gives a scale for it.
        guided_by: the classifier that guides a UNet.
        note: advice on sampling, and where the sources differ.
    """

    name: str
    network: UNetConfig | ClassifierConfig
    diffusion: DiffusionConfig | EdmConfig
    sampler: SamplerConfig
    fast_sampler: SamplerConfig | None = None
    guided_by: str | None = None
    note: str = ""

    @property
    def kind(self) -> Kind:
        """Role of the network."""
        return network_kind(self.network)

    @property
    def file(self) -> str:
        """The name of the published file."""
        return f"{self.name}.pt"

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return _COSTS[self.name][0]

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights in float32."""
        return 4 * self.parameters

    @property
    def forward_flops(self) -> int:
        """Operations of one evaluation for one image; a multiply-add counts as two.

        Counts convolutions, linear layers and attention.
        """
        return _COSTS[self.name][1]

    @property
    def step_flops(self) -> int:
        """Operations of the network's part of a step; for a classifier, with its input gradient.

        The backward pass to the input costs as much as the forward pass for a convolution, and twice as much
        for a product of attention.
        """
        return _COSTS[self.name][2]


_CHANNEL_MULT = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
_IMAGENET_CLASSES = 1000
_COSTS = {  # parameters, operations per evaluation, operations per step
    "64x64_diffusion": (295_904_454, 219_356_037_120, 219_356_037_120),
    "64x64_classifier": (65_438_568, 38_083_995_648, 80_892_876_800),
    "128x128_diffusion": (421_529_606, 613_855_789_056, 613_855_789_056),
    "128x128_classifier": (42_568_040, 42_006_456_320, 86_376_667_136),
    "256x256_diffusion": (553_838_086, 2_239_665_537_024, 2_239_665_537_024),
    "256x256_classifier": (54_096_360, 146_623_145_984, 295_674_796_032),
    "512x512_diffusion": (558_997_638, 3_964_669_526_016, 3_964_669_526_016),
    "512x512_classifier": (54_448_360, 225_459_677_184, 453_347_465_216),
    "256x256_diffusion_uncond": (552_814_086, 2_239_665_537_024, 2_239_665_537_024),
    "64_256_upsampler": (311_795_910, 1_263_284_748_288, 1_263_284_748_288),
    "128_512_upsampler": (308_835_270, 5_009_569_972_224, 5_009_569_972_224),
    "lsun_bedroom": (552_814_086, 2_239_665_537_024, 2_239_665_537_024),
    "lsun_cat": (552_814_086, 2_239_665_537_024, 2_239_665_537_024),
    "lsun_horse": (552_814_086, 2_239_665_537_024, 2_239_665_537_024),
    "lsun_horse_nodropout": (552_814_086, 2_239_665_537_024, 2_239_665_537_024),
    **dict.fromkeys(
        ("edm_imagenet64_ema", "cd_imagenet64_l2", "cd_imagenet64_lpips", "ct_imagenet64"),
        (295_899_267, 219_313_569_792, 219_313_569_792),
    ),
    **dict.fromkeys(
        (
            "edm_bedroom256_ema",
            "cd_bedroom256_l2",
            "cd_bedroom256_lpips",
            "ct_bedroom256",
            "edm_cat256_ema",
            "cd_cat256_l2",
            "cd_cat256_lpips",
            "ct_cat256",
        ),
        (526_304_771, 2_238_706_614_272, 2_238_706_614_272),
    ),
}
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


_HEUN = SamplerConfig(method="heun", steps="79", scale=0.0)  # 40 levels, as published


def _ddim25(scale: float) -> SamplerConfig:
    return SamplerConfig(method="ddim", steps="ddim25", scale=scale)


_SCALE_DISPUTE = (
    "For 25 steps of DDIM at 128x128 the original README's example has scale 1.0, the paper's table 14 has "
    "1.25; the paper's is recommended here."
)
_UNCONDITIONAL = "Without labels of its own it needs much more guidance than a class-conditional model."
_UNGUIDED = "The paper guides the low-resolution stage alone: leave this one unguided."
_NO_LEVELS = "No levels of two evaluations were published for it; those of the bedrooms are recommended."
_EVERY_STEP = (
    "No classifier was published. The best samples take all of the 1000 steps, as the original README says; "
    "250 take a quarter of the time."
)


def _published() -> Iterator[Preset]:
    conditional = {"num_classes": _IMAGENET_CLASSES}
    adm_64 = {"model_channels": 192, "num_res_blocks": 3, "new_attention_order": True, "dropout": 0.1}
    for size, scale, fast_scale, diffusion, changes in (
        (64, 1.0, None, _COSINE, adm_64),
        (128, 0.5, 1.25, _LINEAR, {"num_head_channels": None}),
        (256, 1.0, 2.5, _LINEAR, {}),
        (512, 4.0, 9.0, _LINEAR, {}),
    ):
        sampling: dict[str, Any] = {
            "diffusion": diffusion,
            "sampler": SamplerConfig(scale=scale),
            "fast_sampler": None if fast_scale is None else _ddim25(fast_scale),
            "note": _SCALE_DISPUTE if size == 128 else "",
        }
        unet, guide = f"{size}x{size}_diffusion", f"{size}x{size}_classifier"
        yield Preset(unet, _unet(size, **conditional, **changes), guided_by=guide, **sampling)
        classifier = ClassifierConfig(
            image_size=size,
            channel_mult=_CHANNEL_MULT[size],
            num_res_blocks=4 if size == 64 else 2,
            num_classes=_IMAGENET_CLASSES,
        )
        yield Preset(guide, classifier, **sampling)
    strongly: dict[str, Any] = {"sampler": SamplerConfig(scale=10.0), "guided_by": "256x256_classifier"}
    yield Preset("256x256_diffusion_uncond", _unet(256), _LINEAR, note=_UNCONDITIONAL, **strongly)

    unguided: dict[str, Any] = {"sampler": SamplerConfig(scale=0.0), "note": _UNGUIDED}
    upsampler = conditional | {"model_channels": 192, "channel_mult": _CHANNEL_MULT[256]}
    to_256 = _unet(256, **upsampler, low_res_size=64, num_head_channels=None)
    to_512 = _unet(512, **upsampler, low_res_size=128, attention_resolutions=(32, 16))
    yield Preset("64_256_upsampler", to_256, _LINEAR, **unguided)
    yield Preset("128_512_upsampler", to_512, _LINEAR, **unguided)

    every_step: dict[str, Any] = {"sampler": SamplerConfig(steps="1000", scale=0.0), "note": _EVERY_STEP}
    for name, dropout in (("bedroom", 0.1), ("cat", 0.1), ("horse", 0.1), ("horse_nodropout", 0.0)):
        yield Preset(f"lsun_{name}", _unet(256, dropout=dropout), _LINEAR, **every_step)
    yield from _consistency_models()


def _consistency_models() -> Iterator[Preset]:
    """The models of openai/consistency_models: EDM diffusion models, distilled and directly trained ones."""
    plain = {"learn_sigma": False, "new_attention_order": True}
    imagenet = _unet(64, model_channels=192, num_res_blocks=3, num_classes=_IMAGENET_CLASSES, **plain)
    lsun = _unet(256, scale_shift_norm=False, **plain)
    for images, network, l2, lpips, ct in (
        ("imagenet64", imagenet, (0, 22, 39), (0, 22, 39), (0, 106, 200)),
        ("bedroom256", lsun, (0, 18, 39), (0, 17, 39), (0, 67, 150)),
        ("cat256", lsun, (0, 18, 39), (0, 17, 39), (0, 62, 150)),
    ):
        dropped = network.model_copy(update={"dropout": 0.1})
        yield Preset(f"edm_{images}_ema", dropped, EdmConfig(boundary=False), _HEUN)
        for name, levels in (
            (f"cd_{images}_l2", l2),
            (f"cd_{images}_lpips", lpips),
            (f"ct_{images}", ct),
        ):
            sampler = SamplerConfig(
                method="consistency", steps="2", scale=0.0, levels=levels, levels_of=levels[-1] + 1
            )
            note = _NO_LEVELS if name.startswith("cd_cat") else ""
            yield Preset(name, network, EdmConfig(boundary=True), sampler, note=note)


PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _published()})
"""Every published checkpoint by name."""
