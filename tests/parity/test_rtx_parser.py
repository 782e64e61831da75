"""Every graph of a bundle through the real TensorRT-RTX parser, which needs no GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
import pytest
import torch
from goldens import generated_weights
from onnx_graphs import POOLS, gradient_graph
from rtx import NEEDS_RTX
from torch import nn

from admtrt.config import UNetConfig
from admtrt.export.check import rtx_parser_errors
from admtrt.export.gradient import export_input_gradient
from admtrt.export.graphs import unet_graph
from admtrt.export.small_graphs import update_graph
from admtrt.export.write import write_graph
from admtrt.models.unet import UNet

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = NEEDS_RTX


@pytest.mark.parametrize("conv_backward", ["flipped", "transposed"])
@pytest.mark.parametrize("pool", POOLS)
def test_classifier_gradient(pool: str, conv_backward: Any, tmp_path: Path) -> None:
    onnx.save(gradient_graph(pool, conv_backward), tmp_path / "g.onnx")
    assert rtx_parser_errors(tmp_path / "g.onnx") == []


UNETS = {
    "class-conditional": {"num_classes": 5, "resblock_updown": True, "num_head_channels": 16},
    "unconditional": {"learn_sigma": False, "scale_shift_norm": False, "new_attention_order": True},
    "upsampler": {"low_res_size": 4, "conv_resample": False, "rescale_residuals": True},
}


@pytest.mark.parametrize("name", UNETS)
def test_unet_and_update(name: str, tmp_path: Path) -> None:
    config = UNetConfig(
        image_size=8,
        model_channels=32,
        num_res_blocks=1,
        channel_mult=(1, 2),
        attention_resolutions=(4,),
        **UNETS[name],
    )
    for graph, model in (
        ("unet", unet_graph(generated_weights(UNet(config)))),
        ("update", update_graph(config)),
    ):
        write_graph(model, tmp_path / f"{graph}.onnx")
        assert rtx_parser_errors(tmp_path / f"{graph}.onnx") == []


def test_gradient_of_another_module(tmp_path: Path) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 3),
    )  # fmt: skip
    path = tmp_path / "g.onnx"
    inputs = {"x": torch.zeros(2, 3, 8, 8)}
    export_input_gradient(module.eval(), inputs, path, scalar=lambda out, x: out.logsumexp(dim=1))
    assert rtx_parser_errors(path) == []
