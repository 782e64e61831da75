"""Modules that nearly match a pass, or need several, beside autograd and on two inference libraries."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx
import openvino
import pytest
import torch
from goldens import relative_error
from onnx_graphs import Function, run
from torch import Tensor, nn
from torch.nn import functional as F

from admtrt.export.gradient import export_input_gradient
from admtrt.runtime.backends.openvino_passes import separate_weights

if TYPE_CHECKING:
    from pathlib import Path


class Pooled(nn.Module):
    """Channels-last, then pooled: PyTorch makes a strided view of it."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)
        return F.adaptive_avg_pool2d(h, 1).flatten(1).sin().sum(1)


class RelativePositions(nn.Module):
    """Scaled queries meet the keys, unscaled ones a table."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.table = nn.Conv1d(4, 12, 1), nn.Parameter(torch.randn(7, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, 1)
        q = q.transpose(1, 2)
        return (((q * 0.5) @ k + q @ self.table.T).softmax(-1) @ v.transpose(1, 2)).sum((1, 2))


class OriginalAttention(nn.Module):
    """As the original writes it: products by einsum, norm and softmax in float32, heads in the batch axis."""

    def __init__(self, channels: int, heads: int, *, new_order: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(channels // 4, channels)
        self.qkv, self.proj = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)
        self.heads, self.new_order = heads, new_order

    def forward(self, image: Tensor) -> Tensor:
        n, c, *size = image.shape
        x = image.reshape(n, c, -1)
        width, length = c // self.heads, x.shape[2]
        qkv = self.qkv(self.norm(x.float()).type(x.dtype))
        scale = 1 / math.sqrt(math.sqrt(width))
        if self.new_order:  # parts before heads
            q, k, v = qkv.chunk(3, dim=1)
            q = (q * scale).view(n * self.heads, width, length)
            k = (k * scale).view(n * self.heads, width, length)
            v = v.reshape(n * self.heads, width, length)
        else:
            q, k, v = qkv.reshape(n * self.heads, width * 3, length).split(width, dim=1)
            q, k = q * scale, k * scale
        weights = torch.einsum("bct,bcs->bts", q, k)
        weights = torch.softmax(weights.float(), dim=-1).type(weights.dtype)
        h = torch.einsum("bts,bcs->bct", weights, v).reshape(n, -1, length)
        return (x + self.proj(h)).reshape(n, c, *size).square().mean((1, 2, 3))


class PartAndWhole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv1d(4, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        r = self.qkv(x).reshape(-1, 2, 6, 7)
        q, k, v = r.chunk(3, 2)
        return ((q * 0.5 * k).softmax(-1) * v).sum((1, 2, 3)) + (r.mean(2) ** 2).sum((1, 2))


class Modulated(nn.Module):
    """An adaptive norm whose shift is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 16), nn.GroupNorm(2, 8)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.linear(e)[:, :, None].chunk(2, 1)
        return ((self.norm(x) * (1 + scale) + shift).tanh() * shift).sum((1, 2))


class AlongTheLastAxis(nn.Module):
    """gamma and beta belong to positions, of which there are as many as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 16)
        self.gamma, self.beta = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.linear(e)[:, :, None].chunk(2, 1)
        n = F.layer_norm(x, (8,)) * self.gamma + self.beta
        return (n * (1 + scale) + shift).tanh().sum((1, 2))


class GreyStem(nn.Module):
    """An affine map that makes three channels of one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2, stride=2)
        self.g, self.b = nn.Parameter(torch.randn(3, 1, 1)), nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x * self.g + self.b).square().sum((1, 2, 3))


class TokensFirst(nn.Module):
    """Projections unsqueezed before the features, as transformers do it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(6, width)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return ((x + self.a(e)[:, None]).tanh() * self.b(e)[:, None]).sum((1, 2))


class ScaledPart(nn.Module):
    """The scaled part of a convolution is the output itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).chunk(2, 1)[0].reshape(-1) * 0.5


class FirstOf(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[:, 0, 0]


def enlarged(x: Tensor) -> Tensor:
    """Enlarge by a factor of 3.2, which the sizes 4 and 12 do not show."""
    return F.interpolate(x, scale_factor=3.2, mode="nearest").square().sum((1, 2, 3))


def decoded(x: Tensor) -> Tensor:
    """Networks for images: gradients that no rule of a single operator shows."""
    stem = F.max_pool2d(F.pad(x, (1, 2, 2, 1), mode="reflect").sin(), 3, 2, 1, ceil_mode=True)
    small = F.avg_pool2d(F.adaptive_avg_pool2d(stem, (5, 3)), 3, 1, 1)
    large = F.interpolate(small, size=(9, 8), mode="bilinear")
    again = F.interpolate(large, scale_factor=1.7, mode="nearest").clone()
    again[:, 0] = again[:, 1] * 2
    return again[:, [0, 2, 2]].square().sum((1, 2, 3))


def ordered(x: Tensor) -> Tensor:
    """Sorted, added up, multiplied, by angle and by einsum."""
    total = x.sort(dim=1)[0].cumsum(1) * x.topk(3, dim=1)[0].prod(1, keepdim=True)
    angle = torch.atan2(total, 2 ** (x.fmod(0.7)))
    return torch.einsum("ni,nj->nij", angle, x).square().sum((1, 2)) + x.quantile(0.3, dim=1)


class Recurrent(nn.Module):
    """Sequences [N, 4, 3] through every kind of recurrence, in both directions, states included."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2, 2, batch_first=True, bidirectional=True)
        self.gru, self.rnn = nn.GRU(4, 3, batch_first=True), nn.RNN(3, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states, (_, cells) = self.lstm(x)
        states, last = self.gru(states)
        return self.rnn(states)[0].sin().sum((1, 2)) + last.square().sum((0, 2)) + cells.square().sum((0, 2))


def transformed(x: Tensor) -> Tensor:
    """Images [N, 2, 6, 6] through transforms."""
    spectrum = torch.fft.fft2(x)
    filtered = torch.fft.ifft2(spectrum * (2 + 1j)).real  # OpenVINO misreads onesided transforms backwards
    patches = F.fold(F.unfold(filtered.sin(), 3, padding=1), (6, 6), 3, padding=1)
    turn = torch.tensor([[[0.8, 0.6, 0.1], [-0.6, 0.8, 0]]]).expand(x.shape[0], -1, -1)
    grid = F.affine_grid(turn, [x.shape[0], 2, 6, 6], align_corners=False)
    turned = F.grid_sample(patches, grid, align_corners=False)
    return turned.square().sum((1, 2, 3)) + spectrum.abs().sum((1, 2, 3))


def assigned(x: Tensor, y: Tensor) -> Tensor:
    """[N, 4, 5] with assignments, sums at indices, labels; the score as OpenAI's cond_fn picks it."""
    z = x.clone()
    z[:, 1, 2:4] = 0
    z[:, :, ::2] *= 2
    z[:, [0, 2]] = x[:, [3, 3]].sin()
    z = z.index_add(1, torch.tensor([0, 2, 0]), x[:, 1:])
    z = z + z[:, :, x[0, 0].argmax()][:, :, None]
    mixed = torch.einsum("nij,jk,k->ni", z, torch.arange(10.0).reshape(5, 2), torch.ones(2))
    scores = mixed + z @ torch.arange(5.0)
    picked = scores.log_softmax(1)[torch.arange(x.shape[0]), y]
    return picked - F.cross_entropy(scores.sin(), y, reduction="none")


def chosen(x: Tensor, y: Tensor) -> Tensor:
    return x.log_softmax(1).gather(1, y[:, None])[:, 0]


E = torch.zeros(2, 6)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (RelativePositions(), {"x": torch.zeros(2, 4, 7)}),
        (OriginalAttention(8, 1, new_order=False), {"x": torch.zeros(2, 8, 3, 4)}),
        (OriginalAttention(8, 2, new_order=False), {"x": torch.zeros(2, 8, 3, 3)}),
        (OriginalAttention(16, 4, new_order=True), {"x": torch.zeros(2, 16, 2, 4)}),
        (OriginalAttention(12, 1, new_order=True), {"x": torch.zeros(2, 12, 3, 3)}),
        (PartAndWhole(), {"x": torch.zeros(2, 4, 7)}),
        (Modulated(), {"x": torch.zeros(2, 8, 4), "e": E}),
        (Modulated(), {"e": E, "x": torch.zeros(2, 8, 4)}),
        (AlongTheLastAxis(), {"x": torch.zeros(2, 8, 8), "e": E}),
        (GreyStem(), {"x": torch.zeros(2, 1, 6, 6)}),
        (TokensFirst(5), {"x": torch.zeros(2, 4, 5), "e": E}),
        (TokensFirst(1), {"x": torch.zeros(2, 4, 1), "e": E}),
        (ScaledPart(), {"x": torch.zeros(2, 3, 4, 4)}),
        (Function(lambda x: F.logsigmoid(x).sum(1)), {"x": torch.full((2, 3), -60.0)}),
        (Function(lambda x: (x**0 + x).sum(1)), {"x": torch.zeros(2, 3)}),
        (Function(chosen), {"x": torch.zeros(2, 5), "y": torch.tensor([4, 1])}),
        (FirstOf(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), {"x": torch.zeros(2, 3, 8)}),
        (Function(enlarged), {"x": torch.zeros(2, 2, 4, 4)}),
        (Function(decoded), {"x": torch.zeros(2, 3, 10, 9)}),
        (Function(ordered), {"x": torch.zeros(2, 5)}),
        (Pooled(), {"x": torch.zeros(2, 4, 3, 3)}),
        (Recurrent(), {"x": torch.zeros(2, 4, 3)}),
        (Function(transformed), {"x": torch.zeros(2, 2, 6, 6)}),
        (Function(assigned), {"x": torch.zeros(2, 4, 5), "y": torch.tensor([3, 1])}),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_modules_that_nearly_match_a_pass(
    module: nn.Module, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    """The export's own comparison with autograd must pass, on ONNX Runtime and on OpenVINO."""
    if next(iter(inputs)) == "e":
        module = Function(lambda e, x, inner=module: inner(x, e))
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    wrt = next(iter(inputs))
    export_input_gradient(module.eval(), inputs, tmp_path / "g.onnx", wrt=wrt)
    rows = {name: value[[0, 1, 0]].clone() for name, value in inputs.items()}
    given = rows | {
        name: value + torch.randn(value.shape, generator=generator)
        for name, value in rows.items()
        if value.is_floating_point()
    }
    expected = run(onnx.load(tmp_path / "g.onnx"), **given)
    core = openvino.Core()
    model = core.read_model(str(tmp_path / "g.onnx"))
    separate_weights(model)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled({name: value.numpy() for name, value in given.items()})
    assert relative_error(found["grad"], expected["grad"]) <= 1e-4
    np.testing.assert_allclose(found["value"], expected["value"], rtol=1e-4, atol=1e-5)  # sums that cancel
