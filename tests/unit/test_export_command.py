"""What `admtrt export` refuses, and what it recommends where nothing can be guided."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundles import UNET, network, pipeline

from admtrt.cli import run
from admtrt.config import ClassifierConfig
from admtrt.errors import ConfigError
from admtrt.models.checkpoint import save_checkpoint

HEADS = {
    "image_size": 8,
    "num_classes": 3,
    "model_channels": 64,
    "channel_mult": [1],
    "attention_resolutions": [8],
}


def test_scale_without_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = network(UNET)
    save_checkpoint(tmp_path / "unet.safetensors", unet.module.state_dict(), unet.config)
    code = run(["export", str(tmp_path / "unet.safetensors"), "--out", str(tmp_path / "b"), "--scale", "2"])
    assert code == 2
    assert "--scale 2 recommends guidance without a --classifier" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("name", "guided"), [("guided", True), ("upsampler", False)])
def test_a_bundle_without_classifier_recommends_no_guidance(name: str, guided: bool) -> None:
    assert bool(pipeline(name).bundle.manifest.sampler.scale) is guided


def test_heads_that_a_default_would_override() -> None:
    with pytest.raises(
        ConfigError, match="num_heads 2 would be ignored beside the default num_head_channels 64"
    ):
        ClassifierConfig.from_dict(HEADS | {"num_heads": 2})
    chosen = ClassifierConfig.from_dict(HEADS | {"num_heads": 2, "num_head_channels": 32})
    assert ClassifierConfig.from_dict(chosen.to_dict()) == chosen
