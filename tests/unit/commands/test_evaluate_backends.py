"""`admtrt evaluate nll`: the backend of a bundle, and settings for a checkpoint that contains none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import UNET, exported_bundle, network
from PIL import Image

from admtrt.cli import run
from admtrt.models.checkpoint import save_checkpoint


@pytest.fixture
def images(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(3).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    return tmp_path / "images.npz"


def nll(capsys: pytest.CaptureFixture[str], images: Path, *options: Any) -> float:
    fixed = ["evaluate", "nll", "--data", images, "--steps", "3", "--json"]
    code = run([str(part) for part in (*fixed, *options)])
    shown, complaint = capsys.readouterr()
    assert code == 0, complaint
    return float(json.loads(shown)["bits_per_dim"])


def test_a_bundle_on_other_backends(
    capsys: pytest.CaptureFixture[str], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ["--bundle", exported_bundle("guided"), "--threads", "1"]
    exact = nll(capsys, images, *options)
    # Sums in another order; the bound divides by the smallest variances.
    assert nll(capsys, images, *options, "--backend", "openvino") == pytest.approx(exact, rel=1e-4)
    assert nll(capsys, images, *options, "--backend", "auto") == pytest.approx(exact, rel=1e-4)


def test_settings_of_a_checkpoint(capsys: pytest.CaptureFixture[str], images: Path, tmp_path: Path) -> None:
    """An original file does not contain its schedule; another schedule gives another likelihood."""
    loaded = network(UNET)
    save_checkpoint(tmp_path / "own.safetensors", loaded.module.state_dict(), loaded.config)
    torch.save(loaded.module.state_dict(), tmp_path / "original.pt")
    section = "\n".join(
        f"{key} = {json.dumps(value)}" for key, value in UNET.to_dict().items() if value is not None
    )
    found = {}
    for schedule in ("linear", "cosine"):
        file = tmp_path / f"{schedule}.toml"
        file.write_text(
            f'[unet]\n{section}\nnum_head_channels = "none"\n[diffusion]\nschedule = "{schedule}"\n'
        )
        found[schedule] = nll(capsys, images, "--unet", tmp_path / "original.pt", "--config", file)
    assert found["linear"] == nll(capsys, images, "--unet", tmp_path / "own.safetensors")
    assert abs(found["cosine"] - found["linear"]) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--unet", "x.pt", "--backend", "openvino"], "are for a bundle; a checkpoint runs in PyTorch"),
        (["--unet", "x.pt", "--precision", "bf16"], "are for a bundle; a checkpoint runs in PyTorch"),
        (["--unet", "x.pt", "--threads", "2"], "are for a bundle; a checkpoint runs in PyTorch"),
        (["--bundle", "x", "--unet-weights", "ema"], "are for a checkpoint; a bundle carries its settings"),
        (["--bundle", "x", "--backend", "cuda"], "backend 'cuda' is unknown"),
        (["--bundle", "x", "--precision", "bf16"], "computes in fp32, not in bf16"),
    ],
)
def test_refused(capsys: pytest.CaptureFixture[str], images: Path, options: list[str], message: str) -> None:
    assert run(["evaluate", "nll", "--data", str(images), *options]) == 2
    assert message in capsys.readouterr().err.replace("\n       ", " ")


def test_bad_images_are_left_out_where_that_is_set(
    capsys: pytest.CaptureFixture[str], images: Path, tmp_path: Path
) -> None:
    """As the refusal advises."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, pixels in enumerate(np.load(images)["arr_0"]):
        Image.fromarray(pixels[..., 0]).save(folder / f"{index}.png")
    (folder / "bad.png").write_bytes(b"no image")
    bundle = ["--bundle", exported_bundle("guided")]
    arguments = ["evaluate", "nll", "--data", folder, *bundle, "--steps", "3"]
    assert run([str(argument) for argument in arguments]) == 2
    assert 'set data.on_bad_file = "skip"' in capsys.readouterr().err
    skipping = ["--set", "data.on_bad_file=skip"]
    assert nll(capsys, folder, *bundle, *skipping) == nll(capsys, images, *bundle)
    for wrong, message in (
        ("data.on_bad_files=skip", "did you mean 'on_bad_file'?"),
        ("unet.image_size=8", "--set unet.image_size=8 concerns no images"),
        ("data.on_bad_file", "is not of the form"),
    ):
        assert run([*map(str, arguments), "--set", wrong]) == 2
        assert message in capsys.readouterr().err
