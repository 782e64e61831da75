"""Small networks for the tests of checkpoints: their configurations and generated weights."""

from __future__ import annotations

from typing import Any

import torch
from goldens import generated_weights
from torch import Tensor

from admtrt.models.settings import CheckpointConfig, build_network, checkpoint_config_from_settings

SMALL = {
    "image_size": 8,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_resolutions": (4,),
    "num_head_channels": 16,
}
PROCESS = {
    "schedule": "linear",
    "steps": 1000,
    "rescale_timesteps": False,
    "mean_type": "eps",
    "variance_type": "learned_range",
}
"""The settings of a process that tensors do not show."""


def small(kind: Any = "unet", **changes: Any) -> CheckpointConfig:
    """The configuration of a small network."""
    return checkpoint_config_from_settings(kind, SMALL | changes)


def state_of(config: CheckpointConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Generated weights of a small network."""
    state = generated_weights(build_network(config)).state_dict()
    return {key: value.to(dtype) for key, value in state.items()}
