"""``admtrt configure``: a training file for images that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from admtrt.cli import run
from admtrt.config_files import load_config
from admtrt.run_config import RunConfig

Capture = pytest.CaptureFixture[str]


def pictures(folder: Path, *sizes: tuple[int, int], mode: str = "RGB") -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index, size in enumerate(sizes):
            Image.new(mode, size).save(folder / name / f"{index}.png")
    return folder


def configured(capsys: Capture, source: Any, out: Path, *options: str) -> dict[str, Any]:
    assert run(["configure", str(source), "-o", str(out), "--json", *options]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_a_folder_of_classes(tmp_path: Path, capsys: Capture) -> None:
    folder, out = pictures(tmp_path / "photos", (120, 90), (70, 100)), tmp_path / "photos.toml"
    found = configured(capsys, folder, out)
    assert found == {
        "file": str(out), "images": 4, "image_size": 64, "channels": 3, "classes": ["cat", "dog"],
    }  # fmt: skip
    config = load_config(RunConfig, out)
    assert config.classifier is not None
    assert config.unet is not None
    assert (config.classifier.num_classes, config.unet.image_size, config.unet.num_classes) == (2, 64, None)
    assert config.unet.level_sizes == (64, 32, 16, 8)
    assert "# cat, dog" in out.read_text()


@pytest.mark.parametrize(
    ("side", "options", "size", "levels"),
    [
        (28, (), 28, (28, 14, 7)),
        (8, (), 8, (8,)),
        (16, (), 16, (16, 8)),
        (30, (), 16, (16, 8)),
        (5, (), 8, (8,)),
        (300, (), 64, (64, 32, 16, 8)),
        (300, ("--size", "24"), 24, (24, 12)),
        (300, ("--size", "31"), 31, (31,)),
    ],
)
def test_sizes(
    tmp_path: Path, capsys: Capture, side: int, options: tuple[str, ...], size: int, levels: tuple[int, ...]
) -> None:
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((3, side, side, 1), np.uint8))
    found = configured(capsys, tmp_path / "a.npz", tmp_path / "a.toml", *options)
    assert (found["image_size"], found["channels"], found["classes"]) == (size, 1, [])
    config = load_config(RunConfig, tmp_path / "a.toml")
    assert config.unet is not None
    assert config.unet.level_sizes == levels
    assert (config.unet.in_channels, config.classifier) == (1, None)


def test_grey_files_have_one_channel(tmp_path: Path, capsys: Capture) -> None:
    folder = pictures(tmp_path / "scans", (32, 32), mode="L")
    assert configured(capsys, folder, tmp_path / "a.toml")["channels"] == 1


def test_people_are_told_what_to_do_next(tmp_path: Path, capsys: Capture) -> None:
    assert run(["configure", "digits", "-o", str(tmp_path / "d.toml")]) == 0
    shown = capsys.readouterr().out
    assert "1797 images of 8 pixels, trained on at 8x8 in 1 channel, 10 classes" in shown
    assert f"next: admtrt train unet {tmp_path / 'd.toml'} --out runs/d" in shown


def test_what_is_refused(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "a.toml"
    assert run(["configure", str(tmp_path / "nowhere"), "-o", str(out)]) == 2
    assert "does not exist" in capsys.readouterr().err
    out.write_text("mine")
    assert run(["configure", "digits", "-o", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    configured(capsys, "digits", out, "--overwrite")


def test_networks_take_their_sizes_from_the_data() -> None:
    section = {"channel_mult": [1], "attention_resolutions": []}
    given = {"data": {"source": "x", "image_size": 8, "channels": 1}, "unet": section}
    taken = RunConfig.from_dict(given)
    assert taken == RunConfig.from_dict(given | {"unet": section | {"image_size": 8, "in_channels": 1}})
    assert given["unet"] == section
