"""The networks against tensors of the original implementation, per sample to 1e-5."""

from __future__ import annotations

import pytest
import torch
from goldens import arrays, golden_classifier, golden_input, golden_unet, metadata, relative_error

from admtrt.models.classifier import log_prob_gradient

TOLERANCE = 1e-5
UNETS = list(metadata("models")["unet"])
CLASSIFIERS = list(metadata("models")["classifier"])


@pytest.mark.parametrize("name", UNETS)
def test_unet(name: str) -> None:
    entry = metadata("models")["unet"][name]
    unet = golden_unet(name)
    assert {k: list(v.shape) for k, v in unet.state_dict().items()} == entry["params"]
    config = entry["config"]
    x = golden_input(name, 2, config["in_channels"], config["image_size"], config["image_size"])
    y = None if entry["y"] is None else torch.tensor(entry["y"])
    out = unet(torch.from_numpy(x), torch.tensor(entry["timesteps"]), y)
    assert relative_error(out, arrays("models")[f"{name}.out"]) <= TOLERANCE


def test_upsampler() -> None:
    entry = metadata("models")["superres"]["superres"]
    unet = golden_unet("superres")
    assert {k: list(v.shape) for k, v in unet.state_dict().items()} == entry["params"]
    x = torch.from_numpy(golden_input("superres", 2, 3, 32, 32))
    low_res = torch.from_numpy(golden_input("superres.low_res", *entry["low_res_shape"]).clip(-1, 1))
    out = unet(x, torch.tensor(entry["timesteps"]), torch.tensor(entry["y"]), low_res)
    assert relative_error(out, arrays("models")["superres.out"]) <= TOLERANCE


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier(name: str) -> None:
    entry = metadata("models")["classifier"][name]
    classifier = golden_classifier(name)
    assert {k: list(v.shape) for k, v in classifier.state_dict().items()} == entry["params"]
    config = entry["config"]
    x = torch.from_numpy(
        golden_input(name, 2, config["in_channels"], config["image_size"], config["image_size"])
    )
    t, y = torch.tensor(entry["timesteps"]), torch.tensor(entry["y"])
    assert relative_error(classifier(x, t), arrays("models")[f"{name}.logits"]) <= TOLERANCE
    gradient = log_prob_gradient(classifier, x, t, y)
    assert relative_error(gradient, arrays("models")[f"{name}.grad"]) <= TOLERANCE
