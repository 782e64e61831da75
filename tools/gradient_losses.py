"""Guidance losses of x_0 through an ADM UNet of 32 pixels, for gradient_table.py."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from gradient_cases import Calls, Case, disturbed, energy, integers, normal, uniform
from torch import Tensor, nn
from torch.nn import functional as F

from admtrt.config import ClassifierConfig, UNetConfig
from admtrt.models.classifier import Classifier
from admtrt.models.unet import UNet

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradient_cases import Factory

    Operator = Callable[..., Tensor]

SMALL: dict[str, Any] = {
    "image_size": 32, "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2),
    "attention_resolutions": (16,), "num_head_channels": 16,
}  # fmt: skip
IMAGE = (3, 32, 32)


class Predicted(nn.Module):
    """x_0 of a noisy image; its alpha_bar is a function of t, between steps too."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.unet = UNet(UNetConfig(**SMALL | changes))

    def forward(self, x: Tensor, t: Tensor, *rest: Tensor) -> Tensor:
        """x_0 [N, 3, 32, 32] of x and t [N]."""
        log = -t * (
            1e-4 + 0.00995 * t / 1000
        )  # of alpha_bar of the linear schedule, in the limit of small steps
        alpha_bar = log.exp()[:, None, None, None]
        eps = self.unet(x, t, *rest)[:, :3]
        return (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()


def _residual(
    operator: Operator, *modules: nn.Module, shape: tuple[int, ...] = IMAGE, norm: bool = False,
    extra: dict[str, Any] | None = None, wrt: str = "x", **changes: Any,
) -> Case:  # fmt: skip
    """Distance of a measurement and the operator's result on x_0."""

    def loss(predicted: nn.Module, *given: Any) -> Tensor:
        parts, (x, t, target, *rest) = given[: len(modules)], given[len(modules) :]
        labels = (rest.pop(),) if "num_classes" in changes else ()
        residual = operator(*parts, predicted(x, t, *labels), *rest) - target
        return torch.linalg.vector_norm(residual.flatten(1), dim=1) if norm else energy(residual)

    draws = {
        "x": normal(*IMAGE),
        "t": uniform(low=20.0, high=600.0),
        "target": normal(*shape),
        **(extra or {}),
    }
    if "num_classes" in changes:
        draws["y"] = integers(10)
    return Case(Calls(loss, disturbed(Predicted(**changes)), *map(disturbed, modules)), draws, wrt=wrt)


def _classified() -> Case:
    """A classifier of images looks at x_0, as universal guidance does."""
    classifier = Classifier(ClassifierConfig(**SMALL | {"num_classes": 10}))

    def log_p(predicted: nn.Module, scores: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        logits: Tensor = scores(predicted(x, t), torch.zeros_like(t))
        return logits.log_softmax(1).gather(1, y[:, None])[:, 0]

    draws = {"x": normal(*IMAGE), "t": uniform(low=20.0, high=600.0), "y": integers(10)}
    return Case(Calls(log_p, disturbed(Predicted()), disturbed(classifier)), draws)


def _clip(mode: str) -> Case:
    import open_clip

    visual = open_clip.create_model("ViT-B-32").visual

    def embedded(inner: nn.Module, x0: Tensor) -> Tensor:
        return F.normalize(inner(F.interpolate(x0, size=224, mode=mode)), dim=1)

    return _residual(embedded, visual, shape=(512,))


def _timm() -> Case:
    import timm

    return _residual(
        lambda inner, x0: inner(x0),
        timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10, img_size=32),
        shape=(10,),
    )


def _style() -> Case:
    from torchvision.models import vgg11

    def gram(features: nn.Module, x0: Tensor) -> Tensor:
        maps = features(x0).flatten(2)
        return (maps @ maps.mT).flatten(1) / maps.shape[2]

    return _residual(gram, vgg11(weights=None).features[:8], shape=(256 * 256,))


def _blurred(mode: str, x0: Tensor) -> Tensor:
    line = torch.tensor([0.06, 0.24, 0.4, 0.24, 0.06], dtype=x0.dtype)
    return F.conv2d(F.pad(x0, (2, 2, 2, 2), mode=mode), torch.outer(line, line).expand(3, 1, 5, 5), groups=3)


def _blind(x0: Tensor, kernel: Tensor) -> Tensor:
    """A kernel for each sample: the batch moves to the groups."""
    n, c, h, w = x0.shape
    kernels = kernel.repeat_interleave(c, 0)[:, None]
    return F.conv2d(x0.reshape(1, n * c, h, w), kernels, padding=2, groups=n * c).reshape(n, c, h, w)


def _k_space(x0: Tensor, mask: Tensor) -> Tensor:
    return torch.view_as_real(torch.fft.fft2(x0) * mask).flatten(2) / 32


def _k_space_by_matrices(x0: Tensor, mask: Tensor) -> Tensor:
    turns = torch.outer(torch.arange(32), torch.arange(32)).to(x0.dtype) * (2 * torch.pi / 32)
    cos, sin = turns.cos(), turns.sin()
    re, im = cos @ x0 @ cos - sin @ x0 @ sin, cos @ x0 @ sin + sin @ x0 @ cos
    return torch.cat([re * mask, im * mask], 1) / 32


def _quantised(x0: Tensor) -> Tensor:
    """Eight levels, with the gradient of the identity."""
    return x0 + ((x0 * 4).round() / 4 - x0).detach()


def _resized(x0: Tensor, **options: Any) -> Tensor:
    return F.interpolate(x0, scale_factor=0.25, align_corners=False, **options)


def _masked(x0: Tensor, mask: Tensor) -> Tensor:
    return x0 * mask


MASK: dict[str, Any] = {"mask": uniform(1, 32, 32)}
SMALL_IMAGE = (3, 8, 8)
INPAINTING = partial(_residual, _masked, extra=MASK)
LOSSES: dict[str, Factory] = {
    "adm/ADM classifier on x0_hat (universal guidance)": _classified,
    "adm/CLIP ViT-B-32 on x0_hat, bilinear": partial(_clip, "bilinear"),
    "adm/CLIP ViT-B-32 on x0_hat, nearest": partial(_clip, "nearest"),
    "adm/Gaussian blur, reflect padding": partial(_residual, partial(_blurred, "reflect")),
    "adm/Gaussian blur, zero padding": partial(_residual, partial(_blurred, "constant")),
    "adm/MRI k-space mask": partial(_residual, _k_space, shape=(3, 2048), extra=MASK),
    "adm/MRI k-space mask by matrices": partial(
        _residual, _k_space_by_matrices, shape=(6, 32, 32), extra=MASK
    ),
    "adm/adaptive_avg_pool2d": partial(_residual, lambda x0: F.adaptive_avg_pool2d(x0, 8), shape=SMALL_IMAGE),
    "adm/avg_pool2d 4 (super-resolution)": partial(
        _residual, lambda x0: F.avg_pool2d(x0, 4), shape=SMALL_IMAGE
    ),
    "adm/bicubic antialias downsample": partial(
        _residual, partial(_resized, mode="bicubic", antialias=True), shape=SMALL_IMAGE
    ),
    "adm/bicubic downsample": partial(_residual, partial(_resized, mode="bicubic"), shape=SMALL_IMAGE),
    "adm/bilinear downsample": partial(_residual, partial(_resized, mode="bilinear"), shape=SMALL_IMAGE),
    "adm/blur, a kernel for each sample (blind)": partial(
        _residual, _blind, extra={"kernel": uniform(5, 5, high=0.08)}
    ),
    "adm/colourisation: mean of channels": partial(
        _residual, lambda x0: x0.mean(1, keepdim=True), shape=(1, 32, 32)
    ),
    "adm/inpainting mask": INPAINTING,
    "adm/inpainting mask, norm (DPS)": partial(INPAINTING, norm=True),
    "adm/inpainting mask, x0 clipped": partial(
        _residual, lambda x0, mask: x0.clamp(-1, 1) * mask, extra=MASK
    ),
    "adm/mask, BigGAN up/down, new attention order": partial(
        INPAINTING, resblock_updown=True, new_attention_order=True
    ),
    "adm/mask, coefficients as an input": partial(
        _residual, lambda x0, mask, c: x0 * mask * c[:, None, None, None], extra=MASK | {"c": uniform()}
    ),
    "adm/mask, no scale-shift norm, avg-pool down": partial(
        INPAINTING, scale_shift_norm=False, conv_resample=False
    ),
    "adm/quantised (straight through round)": partial(_residual, _quantised),
    "adm/style: VGG Gram of x0_hat (FreeDoM)": _style,
    "adm/timm ViT on x0_hat": _timm,
    "adm/wrt t (time as the input)": partial(INPAINTING, wrt="t"),
    "adm/wrt y (a learned measurement)": partial(INPAINTING, wrt="target"),
    "adm/JPEG-like: DCT of blocks": partial(
        _residual, lambda x0: x0.unfold(2, 8, 8).unfold(3, 8, 8).flatten(1).tanh(), shape=(3072,)
    ),
    "adm/total variation": partial(
        _residual,
        lambda x0: torch.cat([x0.diff(dim=2).flatten(1), x0.diff(dim=3).flatten(1)], 1),
        shape=(5952,),
    ),
    "adm/phase retrieval": partial(_residual, lambda x0: torch.fft.fft2(x0, norm="ortho").abs()),
    "adm/roll, flip and rot90": partial(
        _residual, lambda x0: torch.rot90(x0.roll((1, 2), (2, 3)).flip(3), 1, (2, 3))
    ),
    "adm/class-conditional UNet": partial(INPAINTING, num_classes=10),
}
