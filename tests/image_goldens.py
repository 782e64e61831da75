"""The goldens of sampling that starts from images or is constrained by them: networks, inputs and numbers.

Made with the public code of RePaint, DiffPure, ILVR, diffusion-anomaly and guided-diffusion, by the recipe of
:mod:`goldens` with a separate salt. Final states are float64; of the other states every second row and column
is stored.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from goldens import arrays, classifier_config, metadata, unet_config

from admtrt.bundle import Bundle
from admtrt.config import DiffusionConfig
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.models.checkpoint import CheckpointConfig, LoadedNetwork
from admtrt.models.classifier import Classifier
from admtrt.models.generated import generate_weights, standard_normal
from admtrt.models.unet import UNet

META = metadata("image_starts")
SHAPE = (2, 3, META["image_size"], META["image_size"])
PROCESS = DiffusionConfig(variance_type="learned_range")


def normal(name: str) -> np.ndarray:
    """Generated noise or initial state, float32 [2, 3, S, S]."""
    return standard_normal(f"input:{name}", SHAPE, META["salt"])


def image(name: str) -> np.ndarray:
    """A generated image, float32 [2, 3, S, S] in [-1, 1]."""
    return normal(name).clip(-1, 1)


def stored(name: str) -> np.ndarray:
    """Numbers stored from the public code."""
    return arrays("image_starts")[name]


def _loaded(kind: str, name: str, module: UNet | Classifier) -> LoadedNetwork:
    generate_weights(module, f"{META['salt']}{name}:")
    config = {"kind": kind, kind: module.config.to_dict(), "diffusion": PROCESS.to_dict()}
    return LoadedNetwork(
        module=module.eval().requires_grad_(False), config=CheckpointConfig.from_dict(config)
    )


@cache
def bundle(name: str) -> Bundle:
    """The bundle of one of the UNets. Only ``unet`` has the classifier, which is therefore exported once."""
    path = Path(tempfile.mkdtemp(prefix="admtrt-tests-")) / name
    unet = UNet(unet_config(META["unets"][name]))
    classifier = None
    if name == "unet":
        classifier = _loaded("classifier", "clf", Classifier(classifier_config(META["classifier"])))
    bundle_from_checkpoints(_loaded("unet", name, unet), classifier, path)
    return Bundle.open(path)
