"""Networks of public packages for gradient_table.py, with random weights.

Images are smaller than published where the architecture allows it: a size is given for each.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from gradient_cases import Calls, Case, disturbed, energy, images, integers, labelled, normal, uniform
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from gradient_cases import Factory

TIMM = {
    "coat_lite_tiny": 64, "coatnet_pico_rw_224": 224, "convit_tiny": 224, "convnext_atto": 64,
    "deit3_small_patch16_224": 64, "densenet121": 64, "dpn48b": 64, "efficientnet_b0": 64,
    "eva02_tiny_patch14_224": 56, "ghostnet_050": 64, "hgnetv2_b0": 64, "hiera_tiny_224": 224,
    "levit_128s": 224, "maxvit_pico_rw_256": 256, "mixer_s32_224": 224, "mobilenetv3_small_050": 64,
    "poolformer_s12": 64, "repvgg_a0": 64, "resnet18": 64, "skresnet18": 64,
    "swin_tiny_patch4_window7_224": 224, "vgg11_bn": 64, "vit_small_patch14_dinov2": 56,
    "vit_srelpos_small_patch16_224": 224, "vit_tiny_patch16_224": 64,
    # beyond the first table
    "focalnet_tiny_srf": 224, "xcit_nano_12_p16_224": 64, "inception_v3": 128, "res2net50_26w_4s": 64,
    "resnest14d": 64, "nfnet_l0": 64, "mvitv2_tiny": 224, "hrnet_w18_small": 64, "gcresnet33ts": 64,
    "edgenext_xx_small": 64, "mobilevitv2_050": 64, "pvt_v2_b0": 64, "cait_xxs24_224": 224,
    "twins_svt_small": 224, "volo_d1_224": 224, "regnety_002": 64, "fastvit_t8": 64, "davit_tiny": 224,
    "tf_efficientnet_lite0": 64, "botnet26t_256": 256, "halonet26t": 256, "lambda_resnet26t": 256,
}  # fmt: skip
SIZED = ("deit3", "eva02", "vit_small", "vit_tiny", "xcit")  # take the size of images as an option


def _timm(name: str, size: int) -> Case:
    import timm

    options = {"img_size": size} if name.startswith(SIZED) else {}
    network = timm.create_model(name, pretrained=False, num_classes=100, **options)
    return labelled(network, size, 100)


def _torchvision(name: str, size: int) -> Case:
    from torchvision import models

    return labelled(models.get_model(name, weights=None), size)


def _segmentation(name: str, size: int) -> Case:
    from torchvision import models

    network = models.get_model(name, weights=None, weights_backbone=None, num_classes=4)
    return images(Calls(lambda inner, x: inner(x)["out"], disturbed(network)), size, energy)


def _clip(size: int, front: str = "", enlarged: int = 0, name: str = "ViT-B-32") -> Case:
    """The cosine of an image and a given embedding."""
    import open_clip

    network = open_clip.create_model(name, force_image_size=enlarged or size).visual

    def cosine(visual: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        if front == "adaptive":
            x = F.adaptive_avg_pool2d(x, enlarged)
        elif front:
            x = F.interpolate(x, size=enlarged, mode=front)
        return F.cosine_similarity(visual(x), target)

    width = network.output_dim
    return Case(Calls(cosine, disturbed(network)), {"x": normal(3, size, size), "target": normal(width)})


def _transformers_clip() -> Case:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = small | {"vocab_size": 1000, "eos_token_id": 999}
    vision = small | {"image_size": 64, "patch_size": 16}
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision))

    def similarity(clip: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
        out = clip(input_ids=ids, pixel_values=x)
        return (F.normalize(out.image_embeds, dim=1) * F.normalize(out.text_embeds, dim=1)).sum(1)

    draws = {"x": normal(3, 64, 64), "ids": integers(999, 12)}
    return Case(Calls(similarity, disturbed(network)), draws)


def _transformers(name: str, size: int, **options: Any) -> Case:
    import transformers

    config = getattr(transformers, f"{name}Config")(**options)
    network = getattr(transformers, f"{name}Model")(config)
    return images(Calls(lambda inner, x: inner(x).last_hidden_state, disturbed(network)), size, energy)


def _rotated() -> Case:
    from kornia.geometry.transform import rotate

    draws = {"x": normal(3, 32, 32), "angle": uniform(low=-60, high=60)}
    return Case(Calls(rotate), draws, energy)


def _kornia(name: str, *arguments: Any) -> Case:
    from kornia import filters

    def distance(x: Tensor, target: Tensor) -> Tensor:
        return energy(getattr(filters, name)(x, *arguments) - target)

    return Case(Calls(distance), {"x": normal(3, 32, 32), "target": normal(3, 32, 32)})


def _lpips(net: str) -> Case:
    import lpips

    network = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    draws = {"x": normal(3, 64, 64), "target": normal(3, 64, 64)}
    return Case(Calls(lambda inner, x, y: inner(x, y).flatten(), disturbed(network)), draws)


def _piq(name: str, size: int, **options: Any) -> Case:
    import piq

    def quality(x: Tensor, target: Tensor) -> Tensor:
        out: Tensor = getattr(piq, name)(x, target, data_range=1.0, reduction="none", **options)
        return out

    return Case(Calls(quality), {"x": uniform(3, size, size), "target": uniform(3, size, size)})


def _smp(name: str, encoder: str) -> Case:
    import segmentation_models_pytorch as smp

    return images(getattr(smp, name)(encoder, encoder_weights=None, classes=2), 64, energy)


def _monai(name: str, **options: Any) -> Case:
    from monai.networks import nets

    network = getattr(nets, name)(spatial_dims=2, in_channels=1, out_channels=2, **options)
    return images(network, 64, energy, channels=1)


def _diffusers(name: str, **options: Any) -> Case:
    import diffusers

    widths = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    network = disturbed(getattr(diffusers, name)(**widths | options))
    draws = {"x": normal(3, 16, 16), "t": uniform(high=1000.0)}
    if name == "UNet2DConditionModel":
        return Case(
            Calls(lambda inner, *given: inner(*given).sample, network),
            draws | {"text": normal(7, 32)},
            energy,
        )
    return Case(Calls(lambda inner, x, t: inner(x, t).sample, network), draws, energy)


def _decoder() -> Case:
    import diffusers

    network = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(32, 64), norm_num_groups=8,
    )  # fmt: skip
    return images(Calls(lambda inner, x: inner.decode(x).sample, disturbed(network)), 16, energy, channels=4)


def _sd3() -> Case:
    import diffusers

    network = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    draws = {"x": normal(4, 16, 16), "text": normal(5, 32), "pooled": normal(16), "t": uniform(high=1000.0)}
    return Case(Calls(lambda inner, *given: inner(*given).sample, disturbed(network)), draws, energy)


def _fno() -> Case:
    from neuralop.models import FNO

    return images(
        FNO(n_modes=(6, 6), hidden_channels=8, in_channels=1, out_channels=1), 16, energy, channels=1
    )


def _lstm() -> Case:
    network, head = (
        disturbed(nn.LSTM(6, 12, num_layers=2, batch_first=True, bidirectional=True)),
        nn.Linear(24, 5),
    )

    def log_p(lstm: nn.Module, linear: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        scores: Tensor = linear(lstm(x)[0][:, -1]).log_softmax(1)
        return scores.gather(1, y[:, None])[:, 0]

    return Case(Calls(log_p, network, head.eval()), {"x": normal(9, 6), "y": integers(5)})


def _particles(n: int = 6) -> torch.Tensor:
    """Places on a grid, so that no two particles meet."""
    grid = torch.arange(n)
    return 1.2 * torch.stack([grid % 2, grid // 2 % 2, grid // 4], 1).float()


def _lennard_jones(pairs: bool) -> Case:
    first, second = torch.triu_indices(6, 6, 1)
    start = _particles()

    def potential(x: Tensor) -> Tensor:
        places = start.to(x.dtype) + 0.1 * x
        if pairs:
            squares = (places[:, first] - places[:, second]).square().sum(-1)
        else:
            squares = torch.cdist(places, places)[:, first, second].square()
        attraction = squares**-3
        return (4 * (attraction**2 - attraction)).sum(1)

    return Case(Calls(potential), {"x": normal(6, 3)})


def _determinant() -> Case:
    def log_determinant(x: Tensor) -> Tensor:
        kernel = (-torch.cdist(x, x).square() / 2).exp() + 0.1 * torch.eye(5, dtype=x.dtype)
        return torch.logdet(kernel)

    return Case(Calls(log_determinant), {"x": normal(5, 3)})


def _original(kind: str, **options: Any) -> Case:
    """The original's own networks, whose attention is an einsum in a checkpoint."""
    from guided_diffusion import script_util

    if kind == "classifier":  # 64 pixels are the least that it knows
        draws = {"x": normal(3, 64, 64), "t": uniform(high=1000.0), "y": integers(1000)}
        defaults = script_util.classifier_defaults()
        network = script_util.create_classifier(
            **defaults | {"image_size": 64, "classifier_width": 32, "classifier_depth": 1} | options
        )

        def log_p(classifier: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return classifier(x, t).log_softmax(1).gather(1, y[:, None])[:, 0]

        return Case(Calls(log_p, disturbed(network)), draws)
    defaults = script_util.model_and_diffusion_defaults()
    chosen = {"image_size": 32, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"}
    chosen |= {"attention_resolutions": "16", "learn_sigma": True} | options
    network, _ = script_util.create_model_and_diffusion(**defaults | chosen)
    draws = {"x": normal(3, 32, 32), "t": uniform(high=1000.0)}
    return Case(Calls(lambda inner, x, t: inner(x, t), disturbed(network)), draws, energy)


MODELS: dict[str, Factory] = {
    "original/UNet": partial(_original, "unet"),
    "original/UNet, heads of 16, new order": partial(
        _original, "unet", num_head_channels=16, use_new_attention_order=True
    ),
    "original/UNet, resblock_updown": partial(_original, "unet", resblock_updown=True, num_heads=2),
    "original/classifier": partial(_original, "classifier"),
    "original/classifier, spatial_v2": partial(_original, "classifier", classifier_pool="spatial_v2"),
    "open_clip/RN50 size 64": partial(_clip, 64, name="RN50"),
    "open_clip/ViT-B-32 adaptive 256->224": partial(_clip, 256, "adaptive", 224),
    "open_clip/ViT-B-32 bilinear 64->224": partial(_clip, 64, "bilinear", 224),
    "open_clip/ViT-B-32 native 224": partial(_clip, 224),
    "open_clip/ViT-B-32 nearest 56->224": partial(_clip, 56, "nearest", 224),
    "open_clip/ViT-B-32 size 64": partial(_clip, 64),
    "transformers/CLIPModel image-text": _transformers_clip,
    **{f"timm/{name}": partial(_timm, name, size) for name, size in TIMM.items()},
    "torchvision/alexnet": partial(_torchvision, "alexnet", 96),
    "torchvision/resnet18": partial(_torchvision, "resnet18", 64),
    "torchvision/squeezenet1_1": partial(_torchvision, "squeezenet1_1", 64),
    "torchvision/googlenet": partial(_torchvision, "googlenet", 64),
    "torchvision/shufflenet_v2_x0_5": partial(_torchvision, "shufflenet_v2_x0_5", 64),
    "torchvision/swin_v2_t": partial(_torchvision, "swin_v2_t", 64),
    "torchvision/segmentation.fcn_resnet50": partial(_segmentation, "fcn_resnet50", 64),
    "torchvision/segmentation.deeplabv3_resnet50": partial(_segmentation, "deeplabv3_resnet50", 64),
    "torchvision/segmentation.lraspp_mobilenet_v3_large": partial(
        _segmentation, "lraspp_mobilenet_v3_large", 64
    ),
    "transformers/Dinov2WithRegisters": partial(
        _transformers, "Dinov2WithRegisters", 56,
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56,
    ),
    "transformers/MobileViT": partial(_transformers, "MobileViT", 64, image_size=64),
    "transformers/PoolFormer": partial(_transformers, "PoolFormer", 64),
    "transformers/Segformer": partial(_transformers, "Segformer", 64),
    "transformers/Swinv2": partial(
        _transformers, "Swinv2", 64, image_size=64, depths=[1, 1], num_heads=[2, 4]
    ),
    "kornia/bilateral_blur": partial(_kornia, "bilateral_blur", (5, 5), 0.5, (1.5, 1.5)),
    "kornia/gaussian_blur + L2": partial(_kornia, "gaussian_blur2d", (5, 5), (1.5, 1.5)),
    "kornia/rotate (grid_sample)": _rotated,
    "kornia/sobel": partial(_kornia, "sobel"),
    "kornia/median_blur": partial(_kornia, "median_blur", (3, 3)),
    "lpips/vgg": partial(_lpips, "vgg"),
    "lpips/alex": partial(_lpips, "alex"),
    "lpips/squeeze": partial(_lpips, "squeeze"),
    "piq/multi_scale_ssim": partial(_piq, "multi_scale_ssim", 192),
    "piq/ssim": partial(_piq, "ssim", 64, downsample=False),
    "piq/gmsd": partial(_piq, "gmsd", 64),
    "smp/Unet resnet18": partial(_smp, "Unet", "resnet18"),
    "smp/PSPNet resnet18": partial(_smp, "PSPNet", "resnet18"),
    "smp/FPN resnet18": partial(_smp, "FPN", "resnet18"),
    "monai/AttentionUnet 2d": partial(_monai, "AttentionUnet", channels=(8, 16, 32), strides=(2, 2)),
    "monai/BasicUNet 2d": partial(_monai, "BasicUNet", features=(8, 8, 16, 32, 32, 8)),
    "monai/UNet 2d": partial(_monai, "UNet", channels=(8, 16, 32), strides=(2, 2), num_res_units=1),
    "monai/SwinUNETR 2d": partial(_monai, "SwinUNETR", feature_size=12),
    "monai/UNETR 2d": partial(
        _monai, "UNETR", img_size=64, feature_size=8, hidden_size=48, mlp_dim=96, num_heads=4
    ),
    "diffusers/AutoencoderKL decoder": _decoder,
    "diffusers/SD3Transformer2DModel": _sd3,
    "diffusers/UNet2DConditionModel": partial(
        _diffusers, "UNet2DConditionModel", in_channels=3, out_channels=3, cross_attention_dim=32,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "diffusers/UNet2DModel": partial(
        _diffusers, "UNet2DModel", down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ),
    "diffusers/UNet2DModel resnet-updown": partial(
        _diffusers, "UNet2DModel", down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    ),
    "neuraloperator/FNO": _fno,
    "plain/Lennard-Jones cdist": partial(_lennard_jones, pairs=False),
    "plain/Lennard-Jones index pairs": partial(_lennard_jones, pairs=True),
    "plain/log-determinant of a kernel (DPP)": _determinant,
    "torch/nn.LSTM classifier": _lstm,
}  # fmt: skip
