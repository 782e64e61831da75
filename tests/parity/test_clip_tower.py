"""The vision tower of CLIP, exported by its own library, as a guide through the UNet."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from bundles import UNET, network
from goldens import relative_error
from onnx_graphs import proto, session
from torch import Tensor, nn

from admtrt.contract import X0_WEIGHTS
from admtrt.export.guides.encoders import Cosine, Prepared, cosine
from admtrt.export.guides.graphs import guide_graph
from admtrt.export.inside import OnnxFile

UNBOUNDED = np.float32(1e30)
CLOSE = 2e-5
"""Of a sample's largest value, against float64; 2e-6 was seen, and 5e-6 of PyTorch in float32."""
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"projection_dim": 16, "image_size": 32, "patch_size": 8}
VIT_B_32 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VIT_B_32 |= {"projection_dim": 512, "image_size": 224, "patch_size": 32}


class _Embeddings(nn.Module):
    """Return only the embeddings of the library's module."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = transformers.CLIPVisionConfig(**sizes, attn_implementation="eager")
        self.tower = transformers.CLIPVisionModelWithProjection(config)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.tower(pixel_values=images).image_embeds
        return found


@pytest.mark.parametrize(
    "sizes", [SMALL, pytest.param(VIT_B_32, marks=pytest.mark.slow)], ids=["small", "ViT-B/32"]
)
def test_the_gradient_of_clip_s_tower_through_the_unet(sizes: dict[str, int], tmp_path: Path) -> None:
    tower, side, dimensions = _Embeddings(sizes).eval(), sizes["image_size"], sizes["projection_dim"]
    file = tmp_path / "tower.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch's exporter about its own parts
        torch.onnx.export(
            tower,
            (torch.zeros(2, 3, side, side),),
            file,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    unet, event = network(UNET).module, (1, 8, 8)
    encoder = OnnxFile(file)
    assert (encoder.image, encoder.result) == ((3, side, side), (dimensions,))
    graph = guide_graph(unet, cosine(Prepared(encoder, event, (side, side)), dimensions))
    run = session(proto(graph))
    network_64, loss_64 = copy.deepcopy(unet).double(), Cosine(Prepared(tower, event, (side, side))).double()
    generator = np.random.default_rng(1)
    for count in (3, 1, 5):
        feeds = {
            "x": generator.standard_normal((count, *event)),
            "t": generator.integers(0, 1000, count),
            "x0_from_x": np.full(count, 1.2),
            "x0_from_out": np.full(count, -0.6),
            "guide_clip": np.full(count, UNBOUNDED),
            "embedding": generator.standard_normal((count, dimensions)),
        }
        feeds = {name: values.astype(np.float32) for name, values in feeds.items()}
        grad, value = run.run(["grad", "value"], feeds)
        exact = {name: torch.from_numpy(values).double() for name, values in feeds.items()}
        x = exact["x"].requires_grad_()
        out = network_64(x, exact["t"])
        from_x, from_out = (exact[name][:, None, None, None] for name in X0_WEIGHTS)
        expected = -loss_64(from_x * x + from_out * out[:, :1], exact["embedding"])
        (derivative,) = torch.autograd.grad(expected.sum(), x)
        assert relative_error(grad, derivative.numpy()) < CLOSE
        np.testing.assert_allclose(value, expected.detach().numpy(), rtol=0, atol=1e-6)
