"""Single operators for gradient_table.py: each is a function of x [N, 3, 8], or of an image [N, 4, 8, 8]."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from gradient_cases import Calls, Case, disturbed, normal, uniform
from torch import Tensor, nn
from torch.func import grad as functional_grad
from torch.func import jvp
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradient_cases import Draw, Factory

ROW, IMAGE = (3, 8), (4, 8, 8)


def _summed(function: Callable[..., Tensor], *modules: nn.Module, draw: Draw | None = None) -> Case:
    """The sum of sin(y) times its place, so that no element's gradient equals another's."""

    def value(*given: Tensor) -> Tensor:
        y = function(*given)
        y = y.reshape(y.shape[0], -1)
        return (y * torch.linspace(0.5, 1.5, y.shape[1], dtype=y.dtype)).sin().sum(1)

    return Case(Calls(value, *map(disturbed, modules)), {"x": draw or normal(*ROW)})


def _of(draw: Draw, **functions: Callable[..., Tensor]) -> dict[str, Factory]:
    return {f"torch.{name}": partial(_summed, function, draw=draw) for name, function in functions.items()}


def _assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = x[:, 1] * 2
    return y


class Doubled(torch.autograd.Function):
    """The identity, whose gradient is 2."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:  # noqa: D102, ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:  # noqa: D102, ARG004
        return 2 * g


def _inner_grad(x: Tensor) -> Tensor:
    leaf = x.requires_grad_()
    (grad,) = torch.autograd.grad(leaf.sin().sum(), leaf, create_graph=True)
    return grad


def _weights(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).sin().reshape(shape)


def _standardised(x: Tensor) -> Tensor:
    kernel = _weights(6, 4, 3, 3).to(x.dtype)
    return F.conv2d(x, (kernel - kernel.mean((1, 2, 3), keepdim=True)) / kernel.std((1, 2, 3), keepdim=True))


POSITIVE, INSIDE, ABOVE = (
    uniform(*ROW, low=0.5, high=2.5),
    uniform(*ROW, low=-0.9, high=0.9),
    uniform(*ROW, low=1.1, high=3),
)
PICTURE = normal(*IMAGE)
ELEMENTWISE = {
    **_of(
        normal(*ROW),
        **{
            name: getattr(torch, name)
            for name in (
                "abs",
                "asinh",
                "atan",
                "cos",
                "cosh",
                "deg2rad",
                "erf",
                "erfc",
                "exp",
                "exp2",
                "expm1",
                "frac",
                "neg",
                "reciprocal",
                "sigmoid",
                "sin",
                "sinc",
                "sinh",
                "square",
                "tan",
                "tanh",
            )
        },
    ),
    **_of(
        POSITIVE,
        **{
            name: getattr(torch, name)
            for name in (
                "digamma",
                "lgamma",
                "log",
                "log10",
                "log1p",
                "log2",
                "rsqrt",
                "sqrt",
            )
        },
    ),
    **_of(INSIDE, acos=torch.acos, asin=torch.asin, atanh=torch.atanh, erfinv=torch.erfinv),
    **_of(ABOVE, acosh=torch.acosh),
    **_of(uniform(*ROW, low=0.1, high=0.9), logit=torch.logit),
    **{
        f"F.{function.__name__}": partial(_summed, function)
        for function in (
            F.celu,
            F.elu,
            F.gelu,
            F.glu,
            F.hardshrink,
            F.hardsigmoid,
            F.hardswish,
            F.hardtanh,
            F.leaky_relu,
            F.logsigmoid,
            F.mish,
            F.normalize,
            F.relu,
            F.relu6,
            F.rrelu,
            F.selu,
            F.silu,
            F.softplus,
            F.softshrink,
            F.softsign,
            F.tanhshrink,
        )
    },
}
OF_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "F.normalize p=1": lambda x: F.normalize(x, p=1.0, dim=-1),
    "F.threshold": lambda x: F.threshold(x, 0.1, 0.2),
    "2 ** x": lambda x: 2**x,
    "adaptive_max 1": lambda x: F.adaptive_max_pool1d(x, 1),
    "adaptive_max 4 of 8": lambda x: F.adaptive_max_pool1d(x, 4),
    "adaptive_max 3 of 8": lambda x: F.adaptive_max_pool1d(x, 3),
    "adaptive_avg 3 of 8": lambda x: F.adaptive_avg_pool1d(x, 3),
    "addcmul": lambda x: torch.addcmul(x, x, x.flip(2), value=0.5),
    "aminmax": lambda x: torch.cat(torch.aminmax(x, dim=-1), 1),
    "amax": lambda x: x.amax(-1),
    "amin 2 axes": lambda x: x.amin((1, 2)),
    "argmax one-hot": lambda x: x * F.one_hot(x.argmax(-1), 8),
    "argsort, gather": lambda x: x.gather(2, x.argsort(-1)),
    "atan2": lambda x: torch.atan2(x, x.flip(2) + 0.1),
    "batch statistics (not per sample)": lambda x: x - x.mean(0, keepdim=True),
    "bucketize": lambda x: x * torch.bucketize(x, torch.tensor([-1.0, 0, 1], dtype=x.dtype)),
    "cdist to itself": lambda x: torch.cdist(x, x),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp by values of x": lambda x: x.clamp(x.amin(-1, keepdim=True) / 2, x.amax(-1, keepdim=True) / 2),
    "clamp_min": lambda x: x.clamp_min(0.2),
    "clamp tensors": lambda x: torch.clamp(x, torch.full_like(x, -0.5), torch.full_like(x, 0.5)),
    "complex abs": lambda x: torch.complex(x, x.flip(2) + 1).abs(),
    "complex product": lambda x: torch.view_as_real(torch.complex(x, x.flip(2)) * torch.complex(x + 1, x)),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x.roll(1, 2) + 0.1, dim=-1),
    "cov": lambda x: (x - x.mean(2, keepdim=True)) @ (x - x.mean(2, keepdim=True)).mT / 7,
    "cross": lambda x: torch.linalg.cross(x.mT, x.flip(2).mT),
    "cumlogsumexp": lambda x: torch.logcumsumexp(x, -1),
    "cummax": lambda x: torch.cummax(x, -1).values,
    "cumprod": lambda x: torch.cumprod(x, -1),
    "cumsum": lambda x: torch.cumsum(x, -1),
    "custom Function": Doubled.apply,
    "detach mid": lambda x: x * x.detach().sin(),
    "diag_embed": lambda x: torch.diag_embed(x),
    "diagonal": lambda x: x[:, :, :3].diagonal(dim1=1, dim2=2),
    "diff": lambda x: x.diff(dim=-1),
    "dist/cdist": lambda x: torch.cdist(x[:, :2], x[:, 1:]),
    "double": lambda x: x.double().sin().float(),
    "einsum, four operands": lambda x: torch.einsum("nia,nja,nib,njb->nij", x, x.tanh(), x.sin(), x),
    "einsum, trace": lambda x: torch.einsum("nii->n", x[:, :, :3])[:, None],
    "embedding by one-hot": lambda x: x.softmax(-1) @ _weights(8, 5).to(x.dtype),
    "expand and sum": lambda x: x[:, :, None].expand(-1, -1, 4, -1).cumsum(2),
    "flip": lambda x: x.flip(2),
    "fmod": lambda x: torch.fmod(x, 0.7),
    "fmod by values of x": lambda x: torch.fmod(x, x.flip(2).abs() + 0.3),
    "functional grad inside (score of an energy)": lambda x: functional_grad(lambda v: v.sin().sum())(x),
    "autograd.grad inside": _inner_grad,
    "gather": lambda x: x.gather(2, torch.tensor([0, 3, 3, 7]).expand(x.shape[0], 3, 4)),
    "half": lambda x: x.half().sin().float(),
    "hypot": lambda x: torch.hypot(x, x.flip(2)),
    "index_add": lambda x: torch.zeros_like(x).index_add(2, torch.tensor([0, 0, 1, 2, 3, 4, 5, 5]), x),
    "index_select": lambda x: x.index_select(2, torch.tensor([1, 1, 6])),
    "index by a mask (where)": lambda x: torch.where(x > 0, x, 0.0).sum(-1),
    "index, two lists": lambda x: x[:, [0, 1, 2], [7, 5, 3]],
    "index_put": lambda x: x.index_put(
        (torch.arange(x.shape[0])[:, None], torch.tensor([[0, 2]])), x[:, :2] * 3
    ),
    "jvp inside": lambda x: jvp(torch.sin, (x,), (torch.ones_like(x),))[1],
    "kron": lambda x: (x[:, :, None, :, None] * x[:, None, :, None, :]).flatten(1),
    "kthvalue": lambda x: torch.kthvalue(x, 3, dim=-1).values,
    "layer_norm 2 axes": lambda x: F.layer_norm(x, (3, 8)),
    "layer_norm weight of x": lambda x: F.layer_norm(x, (8,)) * x.sigmoid(),
    "len loop": lambda x: torch.stack([x[i].sin() for i in range(len(x))]),
    "lerp": lambda x: torch.lerp(x, x.flip(2), 0.3),
    "lerp by x": lambda x: torch.lerp(x, x.flip(2), x.sigmoid()),
    "linalg.det": lambda x: torch.linalg.det(x[:, :, :3])[:, None],
    "linalg.inv": lambda x: torch.linalg.inv(x[:, :, :3] + 4 * torch.eye(3, dtype=x.dtype)),
    "log_softmax dim1": lambda x: x.log_softmax(1),
    "logaddexp": lambda x: torch.logaddexp(x, x.flip(2)),
    "logcumsumexp": lambda x: torch.logcumsumexp(x, 2),
    "logsumexp": lambda x: x.logsumexp(-1),
    "logsumexp 2 axes": lambda x: x.logsumexp((1, 2)),
    "masked_fill -inf softmax": lambda x: x.masked_fill(torch.arange(8) > 5, -torch.inf).softmax(-1),
    "masked_fill by x": lambda x: x.masked_fill(x > 0.5, 0.1),
    "matrix_exp by powers": lambda x: torch.linalg.matrix_power(x[:, :, :3], 3),
    "max(dim).values": lambda x: x.max(-1).values,
    "maximum": lambda x: torch.maximum(x, x.flip(2)),
    "median(dim).values": lambda x: x.median(-1).values,
    "meshgrid, grid": lambda x: (
        torch.stack(torch.meshgrid(torch.arange(8), torch.arange(3), indexing="xy")).to(x.dtype)[None, 0] * x
    ),
    "min(dim).values": lambda x: x.min(-1).values,
    "minimum scalar": lambda x: torch.minimum(x, torch.tensor(0.1, dtype=x.dtype)),
    "movedim, unflatten": lambda x: x.unflatten(2, (2, 4)).movedim(3, 1),
    "nan_to_num": lambda x: torch.nan_to_num(x),
    "narrow, select": lambda x: x.narrow(2, 2, 3) + x.select(2, 0)[:, :, None],
    "norm 1": lambda x: x.norm(1, dim=-1),
    "norm 2": lambda x: x.norm(dim=-1),
    "norm 3": lambda x: x.norm(3, dim=-1),
    "norm inf": lambda x: x.norm(torch.inf, dim=-1),
    "norm fro": lambda x: torch.linalg.matrix_norm(x),
    "norm nuc by svd": lambda x: torch.linalg.svdvals(x),
    "pairwise_distance": lambda x: F.pairwise_distance(x, x.flip(2)),
    "pixel_shuffle 1d": lambda x: x.reshape(-1, 3, 2, 4).transpose(2, 3).flatten(2),
    "prod": lambda x: x.prod(-1),
    "prod of all": lambda x: x.flatten(1).prod(1)[:, None],
    "quantile": lambda x: x.quantile(0.3, dim=-1),
    "relu squared": lambda x: x.relu().square(),
    "remainder": lambda x: torch.remainder(x, 0.7),
    "remainder by values of x": lambda x: torch.remainder(x, x.flip(2).abs() + 0.3),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 2),
    "rfft power spectrum": lambda x: torch.fft.rfft(x).abs().square(),
    "irfft of a filtered signal": lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.linspace(1, 0, 5), n=8),
    "fft, ifft": lambda x: torch.fft.ifft(torch.fft.fft(x) * 2j).imag,
    "stft magnitude": lambda x: torch.stft(
        x.flatten(1), 8, 4, window=torch.hann_window(8, dtype=x.dtype), return_complex=True
    ).abs(),
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "roll": lambda x: x.roll(3, 2),
    "scaled_dot_product": lambda x: F.scaled_dot_product_attention(x, x.sin(), x),
    "scaled_dot_product causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "sdpa mask bool": lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=torch.ones(3, 3).tril().bool()
    ),
    "sdpa mask float": lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=_weights(3, 3).to(x.dtype)
    ),
    "scatter": lambda x: torch.zeros_like(x).scatter(
        2, torch.tensor([7, 6, 5, 4, 3, 2, 1, 0]).expand_as(x), x
    ),
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(2, (x.detach().abs() * 2).long().clamp(0, 7), x),
    "scatter_reduce amax": lambda x: torch.zeros_like(x).scatter_reduce(
        2, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]).expand_as(x), x, "amax"
    ),
    "searchsorted": lambda x: x * torch.searchsorted(torch.linspace(-2, 2, 5, dtype=x.dtype), x.detach()),
    "softmax dim1": lambda x: x.softmax(1),
    "softmin": lambda x: F.softmin(x, dim=-1),
    "sort.values": lambda x: x.sort(-1).values,
    "sqrt(sum squares) at 0": lambda x: (x.square().sum(-1) + 1e-12).sqrt(),
    "std": lambda x: x.std(-1),
    "std_mean": lambda x: torch.cat(torch.std_mean(x, -1), 1),
    "take_along_dim argsort": lambda x: torch.take_along_dim(x, x.argsort(-1), -1),
    "tensordot": lambda x: torch.tensordot(x, _weights(8, 3, 2).to(x.dtype), dims=([2, 1], [0, 1])),
    "tile": lambda x: x.tile(1, 2, 2),
    "topk.values": lambda x: x.topk(3).values,
    "topk.values smallest": lambda x: x.topk(2, largest=False).values,
    "trace": lambda x: x[:, :, :3].diagonal(dim1=1, dim2=2).sum(-1, keepdim=True),
    "tril": lambda x: x.tril(),
    "trapezoid": lambda x: torch.trapezoid(x, dx=0.5),
    "unbind, stack": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "unfold (views)": lambda x: x.unfold(2, 3, 2),
    "var unbiased=False": lambda x: x.var(-1, unbiased=False),
    "where": lambda x: torch.where(x > 0, x.sin(), x.exp()),
    "x.pow(tensor)": lambda x: (x.abs() + 0.1).pow(torch.linspace(0.5, 2, 8, dtype=x.dtype)),
    "x.shape[0] scale": lambda x: x.abs() * x.shape[0],
    "x ** -1": lambda x: (x.abs() + 0.1) ** -1,
    "x[:, 0] = ...": _assigned,
    "x ** 2.5": lambda x: (x.abs() + 0.1) ** 2.5,
    "x ** 2": lambda x: x**2,
    "x ** 3": lambda x: x**3,
    "x ** x": lambda x: (x.abs() + 0.1) ** x,
    "x * floor(x)": lambda x: x * torch.floor(x),
    "x * round(x)": lambda x: x * torch.round(x),
    "x * sign(x)": lambda x: x * torch.sign(x),
    "x * trunc(x)": lambda x: x * torch.trunc(x),
    "xlogy": lambda x: torch.xlogy(x, x.flip(2).abs() + 0.1),
    "x[..., ::2] and None": lambda x: x[..., ::2][:, None],
}
OF_IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "avg_pool2d 3/2/1": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg_pool2d ceil, pads not counted": lambda x: F.avg_pool2d(
        x, 3, 2, 1, ceil_mode=True, count_include_pad=False
    ),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "conv2d, kernel of x": lambda x: F.conv2d(x, x.mean(0)[None, :, :3, :3]),
    "conv2d computed weight": lambda x: F.conv2d(x, _weights(8, 4, 3, 3)[1:7].to(x.dtype).tanh()),
    "conv2d weight standardised": _standardised,
    "crop and pad": lambda x: F.pad(x[:, :, 1:-1, 2:], (1, 2, 0, 3)),
    "F.fold": lambda x: F.fold(x.reshape(-1, 16, 16), 5, 2),
    "F.unfold": lambda x: F.unfold(x, 3, padding=1, stride=2),
    "grid_sample bilinear": lambda x: F.grid_sample(x, _grid(x), align_corners=False),
    "grid_sample bicubic": lambda x: F.grid_sample(x, _grid(x), mode="bicubic", align_corners=False),
    "grid_sample border": lambda x: F.grid_sample(x, _grid(x), padding_mode="border", align_corners=True),
    "grid_sample nearest": lambda x: F.grid_sample(x, _grid(x), mode="nearest", align_corners=False),
    "grid_sample reflection": lambda x: F.grid_sample(
        x, _grid(x), padding_mode="reflection", align_corners=False
    ),
    "grid_sample wrt the grid": lambda x: F.grid_sample(
        x, x[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False
    ),
    "affine_grid": lambda x: F.grid_sample(
        x,
        F.affine_grid(x.mean(3)[:, :2, :3].tanh(), [x.shape[0], 4, 5, 5], align_corners=False),
        align_corners=False,
    ),
    "group_norm": lambda x: F.group_norm(x, 2),
    "instance_norm": lambda x: F.instance_norm(x),
    "interpolate area": lambda x: F.interpolate(x, size=5, mode="area"),
    "interpolate bicubic": lambda x: F.interpolate(x, size=13, mode="bicubic", align_corners=True),
    "interpolate bilinear": lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
    "interpolate nearest 3.2": lambda x: F.interpolate(x, scale_factor=3.2, mode="nearest"),
    "interpolate nearest-exact": lambda x: F.interpolate(x, size=5, mode="nearest-exact"),
    "local_response_norm": lambda x: F.local_response_norm(x, 3),
    "lp_pool2d": lambda x: F.lp_pool2d(x.abs() + 0.1, 3, 2),
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(2), 2),
    "max_pool2d 2": lambda x: F.max_pool2d(x, 2),
    "max_pool2d 2 of 7": lambda x: F.max_pool2d(x[..., 1:, 1:], 2),
    "max_pool2d 3/1/1": lambda x: F.max_pool2d(x, 3, 1, 1),
    "max_pool2d 3/2/1": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d ceil": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "max_pool2d dilated": lambda x: F.max_pool2d(x, 2, 1, dilation=2),
    "max_pool2d indices, max_unpool2d": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "max_pool3d": lambda x: F.max_pool3d(x[:, None], 2),
    "pad circular": lambda x: F.pad(x, (1, 2, 2, 1), mode="circular"),
    "pad reflect": lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"),
    "pad replicate": lambda x: F.pad(x, (1, 2, 2, 1), mode="replicate"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 4),
}
MODULES: dict[str, nn.Module] = {
    "batch_norm eval": nn.BatchNorm2d(4),
    "conv2d": nn.Conv2d(4, 6, 3),
    "conv2d depthwise multiplier": nn.Conv2d(4, 8, 3, groups=4),
    "conv2d dilation 2": nn.Conv2d(4, 6, 3, dilation=2),
    "conv2d even kernel": nn.Conv2d(4, 6, 4, padding=1),
    "conv2d groups 2 stride 2": nn.Conv2d(4, 6, 3, stride=2, groups=2),
    "conv2d pad 4 > reach": nn.Conv2d(4, 6, 3, padding=4),
    "conv2d padding_mode circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "conv2d same": nn.Conv2d(4, 6, 3, padding="same"),
    "conv2d stride 2": nn.Conv2d(4, 6, 3, stride=2),
    "conv2d stride 2 dilation 2 pad 3": nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=3),
    "conv2d stride 3 pad 2": nn.Conv2d(4, 6, 3, stride=3, padding=2),
    "conv_transpose2d": nn.ConvTranspose2d(4, 6, 3),
    "conv_transpose2d dilation 2 stride 3": nn.ConvTranspose2d(4, 6, 3, stride=3, dilation=2),
    "conv_transpose2d groups": nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, output_padding=1),
    "conv2d weight_norm": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
    "conv2d spectral_norm": nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)),
    "prelu": nn.PReLU(4),
    "upsampled conv": nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3)),
}
OF_SEQUENCES: dict[str, nn.Module] = {
    "GRU": nn.GRU(8, 5, batch_first=True),
    "LSTM": nn.LSTM(8, 5, batch_first=True),
    "RNN": nn.RNN(8, 5, batch_first=True),
    "MultiheadAttention": nn.MultiheadAttention(8, 2, batch_first=True),
    "TransformerEncoderLayer": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "TransformerDecoderLayer": nn.TransformerDecoderLayer(8, 2, 16, batch_first=True),
}


def _grid(x: Tensor) -> Tensor:
    """Places [N, 5, 5, 2] for grid_sample, some of them outside."""
    places = _weights(1, 5, 5, 2).to(x.dtype) * 1.3
    return places.expand(x.shape[0], 5, 5, 2)


def _sequence(inner: nn.Module, x: Tensor) -> Tensor:
    if isinstance(inner, nn.MultiheadAttention):
        out = inner(x, x, x, need_weights=False)[0]
    elif isinstance(inner, nn.TransformerDecoderLayer):
        out = inner(x, x.flip(1))
    else:
        out = inner(x)
    return out if isinstance(out, Tensor) else out[0]


OPERATORS: dict[str, Factory] = {
    f"op/{name}": factory
    for name, factory in sorted(
        {
            **ELEMENTWISE,
            **{name: partial(_summed, function) for name, function in OF_ROWS.items()},
            **{name: partial(_summed, function, draw=PICTURE) for name, function in OF_IMAGES.items()},
            **{
                name: partial(_summed, lambda inner, x: inner(x), module, draw=PICTURE)
                for name, module in MODULES.items()
            },
            **{name: partial(_summed, _sequence, module) for name, module in OF_SEQUENCES.items()},
        }.items()
    )
}
