"""Tiny networks for tests of ``verify``, and a way to plant a defect in their graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
from bundles import replace_graph
from goldens import generated_weights
from onnx import helper

from admtrt.models.checkpoint import CheckpointConfig, LoadedNetwork, build_network
from admtrt.schedule.sampler import SamplerConfig

if TYPE_CHECKING:
    from pathlib import Path

TINY = {
    "image_size": 8,
    "in_channels": 1,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [4],
    "num_heads": 2,
}
CLASSIFIER = TINY | {"num_classes": 5, "num_head_channels": 32}


def network(
    kind: str, section: dict[str, Any], *, diffusion: dict[str, Any] | None = None, scale: float = 2.0
) -> LoadedNetwork:
    """A network of generated weights."""
    config = CheckpointConfig.from_dict(
        {
            "kind": kind,
            "classifier" if kind == "classifier" else "unet": section,
            "diffusion": diffusion or {},
            "sampler": SamplerConfig(scale=scale).to_dict(),
        }
    )
    return LoadedNetwork(module=generated_weights(build_network(config)), config=config)  # type: ignore[arg-type]


def append_ops(bundle: Path, name: str, output: str, *op_types: str) -> None:
    """Pass one output of a graph through a chain of unary operators."""
    model = onnx.load(bundle / f"{name}.onnx")
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, value in enumerate(names):
                if value == output:
                    names[index] = f"{output}_0"
    for index, op_type in enumerate(op_types):
        made = output if index == len(op_types) - 1 else f"{output}_{index + 1}"
        model.graph.node.append(helper.make_node(op_type, [f"{output}_{index}"], [made]))
    replace_graph(bundle, name, model.SerializeToString())
