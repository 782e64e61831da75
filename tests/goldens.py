"""Rebuild the weights and inputs of the golden tensors, and compare per sample."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from admtrt.config import ClassifierConfig, UNetConfig
from admtrt.models.classifier import Classifier
from admtrt.models.generated import SALT, generate_weights, standard_normal
from admtrt.models.unet import UNet

DATA = Path(__file__).parent / "data"


@cache
def metadata(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"{name}.json").read_text())


@cache
def arrays(name: str) -> Any:
    return np.load(DATA / f"{name}.npz")


assert metadata("models")["salt"] == SALT


def golden_input(name: str, *shape: int) -> np.ndarray:
    return standard_normal("input:" + name, shape)


def probed(x: np.ndarray) -> np.ndarray:
    """The pixels of intermediate states that are stored in the goldens."""
    return x[..., ::2, 1::2]


def generated_weights(module: nn.Module) -> nn.Module:
    """Overwrite every parameter by the recipe (no layer is zero) and switch to evaluation."""
    generate_weights(module)
    return module.eval().requires_grad_(False)


def _backbone(config: dict[str, Any]) -> dict[str, Any]:
    size = config["image_size"]
    return {
        "image_size": size,
        "in_channels": config["in_channels"],
        "model_channels": config["model_channels"],
        "num_res_blocks": config["num_res_blocks"],
        "channel_mult": config["channel_mult"],
        "attention_resolutions": [size // rate for rate in config["attention_resolutions"]],
        "num_heads": config.get("num_heads", 1),
        "num_head_channels": config.get("num_head_channels"),
        "new_attention_order": config.get("use_new_attention_order", False),
        "conv_resample": config.get("conv_resample", True),
        "resblock_updown": config.get("resblock_updown", False),
        "scale_shift_norm": config.get("use_scale_shift_norm", False),
    }


def unet_config(config: dict[str, Any], *, low_res_size: int | None = None) -> UNetConfig:
    return UNetConfig.from_dict(
        _backbone(config)
        | {
            "num_classes": config.get("num_classes"),
            "learn_sigma": config["out_channels"] == 2 * config["in_channels"],
            "num_heads_upsample": config.get("num_heads_upsample"),
            "low_res_size": low_res_size,
        }
    )


def classifier_config(config: dict[str, Any]) -> ClassifierConfig:
    return ClassifierConfig.from_dict(
        _backbone(config) | {"num_classes": config["out_channels"], "pool": config["pool"]}
    )


@cache
def golden_unet(name: str) -> UNet:
    if name == "superres":
        entry = metadata("models")["superres"]["superres"]
        return generated_weights(UNet(unet_config(entry["config"], low_res_size=entry["low_res_shape"][-1])))
    return generated_weights(UNet(unet_config(metadata("models")["unet"][name]["config"])))


@cache
def golden_classifier(name: str) -> Classifier:
    return generated_weights(Classifier(classifier_config(metadata("models")["classifier"][name]["config"])))


def relative_error(actual: Any, expected: Any) -> float:
    """Largest per-sample ratio of max abs difference to max abs reference; NaN and shape errors raise."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert np.isfinite(actual).all()
    difference = np.abs(actual - expected).reshape(len(expected), -1).max(axis=1)
    scale = np.abs(expected).reshape(len(expected), -1).max(axis=1)
    return float((difference / np.maximum(scale, np.finfo(np.float32).tiny)).max())
