"""Bad input to the export: a clear message, exit code 2, no traceback, no lost files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import CLASSIFIER, UNET, network, sham_bundle
from command_faults import refused
from folders import contents
from safetensors.torch import save_file
from sparse_checkpoints import zeros_file

from admtrt.bundle import Bundle
from admtrt.cli import run
from admtrt.models.checkpoint import (
    build_network,
    checkpoint_config_from_preset,
    read_checkpoint_config,
    save_checkpoint,
)

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    loaded = network(UNET)
    save_checkpoint(tmp_path / "unet.safetensors", loaded.module.state_dict(), loaded.config)
    return tmp_path / "unet.safetensors"


def export_refused(capsys: Capture, tmp_path: Path, *arguments: Any) -> str:
    complaint = refused(capsys, "export", *arguments, "--out", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    return complaint


def test_a_missing_checkpoint(capsys: Capture, tmp_path: Path) -> None:
    assert "absent.safetensors does not exist" in export_refused(
        capsys, tmp_path, tmp_path / "absent.safetensors"
    )


@pytest.mark.parametrize("kept", [0, 5, 100, 5000])
def test_a_truncated_checkpoint(capsys: Capture, tmp_path: Path, unet: Path, kept: int) -> None:
    unet.write_bytes(unet.read_bytes()[:kept])
    assert "truncated, damaged or no safetensors file" in export_refused(capsys, tmp_path, unet)


def test_a_truncated_pickle(capsys: Capture, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, tmp_path / "u.pt")
    (tmp_path / "u.pt").write_bytes((tmp_path / "u.pt").read_bytes()[:500])
    assert "truncated, damaged" in export_refused(capsys, tmp_path, tmp_path / "u.pt")


def test_keys_that_do_not_match_name_the_preset(capsys: Capture, tmp_path: Path, unet: Path) -> None:
    with torch.device("meta"):
        published = build_network(checkpoint_config_from_preset("64x64_classifier"))
    shapes = {key: tuple(value.shape) for key, value in published.state_dict().items()}
    path = zeros_file(tmp_path / "c.safetensors", shapes)
    options = ["--classifier", path, "--classifier-preset", "128x128_classifier"]
    complaint = export_refused(capsys, tmp_path, unet, *options)
    assert "are not those of its configuration" in complaint
    assert "64x64_classifier" in complaint


def test_keys_and_shapes_are_named(capsys: Capture, tmp_path: Path, unet: Path) -> None:
    loaded = network(UNET)
    state = dict(loaded.module.state_dict())
    key = next(iter(state))
    state["extra.weight"] = state.pop(key)
    save_checkpoint(unet, state, loaded.config)
    complaint = export_refused(capsys, tmp_path, unet)
    assert f"1 missing: {key}" in complaint
    assert "1 unexpected: extra.weight" in complaint


def test_a_file_of_something_else(capsys: Capture, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "u.safetensors")
    assert "u.safetensors" in export_refused(capsys, tmp_path, tmp_path / "u.safetensors")
    options = ["--unet-preset", "256x256_difusion"]
    complaint = export_refused(capsys, tmp_path, tmp_path / "u.safetensors", *options)
    assert "did you mean '256x256_diffusion'?" in complaint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "some"], "'some' is not a positive whole number"),
        (["--steps", "2000"], "cannot give 2000"),
        (["--steps", "ddim300"], "'ddim334'"),
        (["--method", "plms"], "'method': 'plms' is unknown; expected one of"),
        (["--scale", "nan"], "'scale' is nan"),
        (["--classifier", "absent.safetensors"], "absent.safetensors does not exist"),
        (["--config", "absent.toml"], "cannot read absent.toml"),
    ],
)
def test_export_options(
    capsys: Capture, tmp_path: Path, unet: Path, options: list[str], message: str
) -> None:
    assert message in export_refused(capsys, tmp_path, unet, *options)


def test_a_file_of_settings_without_a_network(capsys: Capture, tmp_path: Path, unet: Path) -> None:
    (tmp_path / "s.toml").write_text('[diffusion]\nschedule = "cosine"\n')
    complaint = export_refused(capsys, tmp_path, unet, "--config", tmp_path / "s.toml")
    assert "s.toml has no section [unet], [upsampler] or [classifier]" in complaint
    assert "--unet-set" in complaint


def test_what_a_file_recommends_may_be_replaced(capsys: Capture, tmp_path: Path) -> None:
    """A network's names and sampler are no facts that a file could contradict."""
    loaded = network(UNET.model_copy(update={"num_classes": 2}))
    save_checkpoint(tmp_path / "u.safetensors", loaded.module.state_dict(), loaded.config)
    (tmp_path / "s.toml").write_text(
        'class_names = ["no", "yes"]\n[sampler]\nmethod = "ddim"\nsteps = "ddim10"\n'
    )
    target = tmp_path / "v.safetensors"
    arguments = [
        "convert",
        str(tmp_path / "u.safetensors"),
        str(target),
        "--config",
        str(tmp_path / "s.toml"),
    ]
    assert run(arguments) == 0
    capsys.readouterr()
    config = read_checkpoint_config(target)
    assert config is not None
    assert config.class_names == ("no", "yes")
    assert (config.sampler.method, config.sampler.steps) == ("ddim", "ddim10")
    (tmp_path / "s.toml").write_text('class_names = ["no", "yes", "both"]\n')
    assert "class_names has 3 names, and the network has 2 classes" in refused(
        capsys, *arguments, "--overwrite"
    )


def test_names_of_another_number_of_classes(capsys: Capture, tmp_path: Path) -> None:
    loaded = network(UNET, class_names=("a",))
    save_checkpoint(tmp_path / "u.safetensors", loaded.module.state_dict(), loaded.config)
    complaint = export_refused(capsys, tmp_path, tmp_path / "u.safetensors")
    assert "the UNet has class names, but no classes" in complaint
    assert "exporting" not in complaint
    with pytest.raises(ValueError, match="class_names has 1 names, and the network has 3 classes"):
        network(UNET.model_copy(update={"num_classes": 3}), class_names=("a",))


def test_networks_that_do_not_fit(capsys: Capture, tmp_path: Path, unet: Path) -> None:
    config = CLASSIFIER.model_copy(update={"in_channels": 3})
    loaded = network(config)
    save_checkpoint(tmp_path / "c.safetensors", loaded.module.state_dict(), loaded.config)
    complaint = export_refused(capsys, tmp_path, unet, "--classifier", tmp_path / "c.safetensors")
    assert "the UNet has in_channels 1 but the classifier 3" in complaint
    assert "of kind 'unet'; expected 'classifier'" in export_refused(
        capsys, tmp_path, unet, "--classifier", unet
    )


def test_an_unknown_key_in_the_settings(capsys: Capture, tmp_path: Path, unet: Path) -> None:
    (tmp_path / "s.toml").write_text("[unet]\nimage_size = 8\nmodel_chanels = 32\n")
    complaint = export_refused(capsys, tmp_path, unet, "--config", tmp_path / "s.toml")
    assert "unknown key 'unet.model_chanels'; did you mean 'model_channels'?" in complaint


def test_an_export_never_replaces_what_it_was_not_told_to(
    capsys: Capture, tmp_path: Path, unet: Path
) -> None:
    sham_bundle(tmp_path / "old")
    before = contents(tmp_path)
    complaint = refused(capsys, "export", unet, "--out", tmp_path / "old")
    assert "already exists" in complaint
    assert "--overwrite" in complaint
    complaint = refused(capsys, "export", unet, "--out", tmp_path, "--overwrite")
    assert "is not a bundle; it is not overwritten" in complaint
    assert "cannot write" in refused(capsys, "export", unet, "--out", unet / "bundle")
    assert contents(tmp_path) == before
    Bundle.open(tmp_path / "old")
