"""Refusals of `admtrt export`, and its recommendation for networks without a guide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bundles import CLASSIFIER, UNET, network, pipeline

from admtrt.cli import run
from admtrt.commands.checkpoints import recommended_sampler
from admtrt.config import ClassifierConfig, UNetConfig
from admtrt.errors import CheckpointError, ConfigError
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.models.checkpoint import CheckpointConfig, save_checkpoint
from admtrt.schedule.sampler import SamplerConfig

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


def test_a_classifier_of_other_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = network(
        UNetConfig.from_dict(UNET.to_dict() | {"num_classes": 3}), class_names=("ant", "bee", "cat")
    )
    guide = network(CLASSIFIER, class_names=("bee", "ant", "cat"))
    for name, loaded in (("unet", unet), ("classifier", guide)):
        save_checkpoint(tmp_path / f"{name}.safetensors", loaded.module.state_dict(), loaded.config)
    files = [str(tmp_path / f"{name}.safetensors") for name in ("unet", "classifier")]
    assert run(["export", files[0], "--classifier", files[1], "--out", str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err
    assert (
        "do not belong together: the UNet's classes are ant, bee, cat; the classifier's are bee, ant" in said
    )
    with pytest.raises(CheckpointError, match="the UNet's classes are"):
        bundle_from_checkpoints(unet, guide, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("command", ["sample", "export", "drift", "evaluate"])
def test_steps_that_are_empty(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An unset variable of a shell would mean every step of the process."""
    given = [command, *(["nll"] if command == "evaluate" else ["x"]), "--steps", ""]
    assert run([*given, *(["--out", "y"] if command in ("sample", "export") else [])]) == 2
    assert "it is empty" in capsys.readouterr().err


def test_the_recommendation_is_shown_whole() -> None:
    manifest = pipeline("guided").bundle.manifest
    assert manifest.recommendation == "ddpm, steps 5, scale 2"
    chosen = SamplerConfig(
        method="ddim", steps="", scale=1.5, eta=0.5, clip=False, guidance_interval=(0.3, 3)
    )
    assert manifest.model_copy(update={"sampler": chosen}).recommendation == (
        "ddim, steps 1000, scale 1.5 at noise levels from 0.3 to 3, eta 0.5, x_0 not clipped"
    )


EDM = {"kind": "edm", "boundary": False}


@pytest.mark.parametrize(
    ("process", "choices", "expected"),
    [
        ({}, {}, ("ddpm", "250", None)),
        ({}, {"method": "auto"}, ("sa", "10", None)),
        ({}, {"method": "auto", "steps": "20", "grid": "karras"}, ("sa", "20", "karras")),
        (EDM, {"method": "auto"}, ("heun", "35", None)),
        (EDM | {"boundary": True}, {"method": "auto"}, ("consistency", "2", None)),
    ],
)
def test_the_measured_recommendation(
    process: dict[str, Any], choices: dict[str, Any], expected: tuple[str, str, str | None]
) -> None:
    """Scale and bound stay the checkpoint's."""
    sampler = {"scale": 0.0, "clip": False}
    unet = UNET.to_dict() | {"learn_sigma": not process}
    described = {"kind": "unet", "unet": unet, "diffusion": process, "sampler": sampler}
    found = recommended_sampler(CheckpointConfig.from_dict(described), choices)
    assert (found.method, found.steps, found.grid) == expected
    assert (found.scale, found.clip) == (0.0, False)


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
