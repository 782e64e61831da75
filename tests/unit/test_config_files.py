"""Configurations from files: overrides, errors, and that written files are read back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from admtrt.config import ClassifierConfig
from admtrt.config_files import load_config, save_config
from admtrt.errors import ConfigError, OutputError
from admtrt.run_config import DataConfig, RunConfig


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


MINIMAL = '[data]\nsource = "digits"\nimage_size = 8\n'


def test_overrides_change_what_they_name(tmp_path: Path) -> None:
    path = written(tmp_path / "run.toml", MINIMAL)
    overrides = [
        "data.source = some/folder with = in it",
        "sampler.steps=50",
        "train_unet.ema_rates=[0.9, 0.99]",
        "train_unet.tensorboard=true",
        'train_unet.loss="vlb"',
        "train_unet.loss=simple",
    ]
    config = load_config(RunConfig, path, overrides)
    assert config.data.source == "some/folder with = in it"
    assert config.sampler.steps == "50"
    assert config.train_unet.ema_rates == (0.9, 0.99)
    assert config.train_unet.tensorboard is True
    assert config.train_unet.loss == "simple"
    assert config == load_config(RunConfig, path, overrides).model_copy()
    assert config != load_config(RunConfig, path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.source", "override 'data.source' is not of the form section.key=value"),
        ("=3", "is not of the form"),
        ("data..source=3", "is not of the form"),
        ("data.source.deeper=3", "'source' is a value, not a section"),
        ("data.sorce=x", "with overrides: unknown key 'data.sorce'; did you mean 'source'?"),
        ("data.image_size=big", "'data.image_size' is 'big'"),
        ("data.image_size=", "'data.image_size' is ''"),
        ("data.image_size=" + "9" * 5000, "'data.image_size' is '999"),
        ("data.image_size=" + "[" * 5000, "'data.image_size' is '[[["),
        ("data=3", "'data' is 3"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, written(tmp_path / "run.toml", MINIMAL), [override])
    assert expected in caught.value.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("not toml", "is not valid TOML"),
        ("[data]\n[data]\n", "is not valid TOML"),
        ("number = " + "9" * 5000, "is not valid TOML"),
        ("list = " + "[" * 5000, "is not valid TOML"),
        (MINIMAL + "chanels = 3\n", "did you mean 'channels'?"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, expected: str) -> None:
    path = written(tmp_path / "run.toml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, path)
    assert str(path) in caught.value.message
    assert expected in caught.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.toml: No such file"):
        load_config(RunConfig, tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        load_config(RunConfig, tmp_path)
    (tmp_path / "latin.toml").write_bytes('source = "é"'.encode("latin-1"))
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(RunConfig, tmp_path / "latin.toml")
    with pytest.raises(OutputError, match="cannot write"):
        save_config(DataConfig(source="digits", image_size=8), tmp_path / "absent" / "run.toml")


@pytest.mark.parametrize(
    "source", ["\U0001f600", "\x7f", "\x00\x1f\t\n", "\\u0041", '"\'\'"""', "é日", "\u2028", ""]
)
def test_any_text_is_read_back(tmp_path: Path, source: str) -> None:
    config = DataConfig(source=source, image_size=8)
    save_config(config, tmp_path / "data.toml")
    assert load_config(DataConfig, tmp_path / "data.toml") == config


def test_none_can_be_written_where_it_is_not_the_default(tmp_path: Path) -> None:
    config = ClassifierConfig(image_size=8, num_classes=2, num_head_channels=None, pool="spatial",
                              channel_mult=(1,), attention_resolutions=())  # fmt: skip
    save_config(config, tmp_path / "c.toml")
    assert 'num_head_channels = "none"' in (tmp_path / "c.toml").read_text()
    assert load_config(ClassifierConfig, tmp_path / "c.toml") == config


@pytest.mark.parametrize("put", [os.mkfifo, lambda file: file.symlink_to("/dev/zero")])
def test_a_file_that_has_no_end_is_refused_at_once(tmp_path: Path, put: Any) -> None:
    put(tmp_path / "run.toml")
    with pytest.raises(ConfigError, match="it is no regular file"):
        load_config(RunConfig, tmp_path / "run.toml")


def test_a_file_of_any_size_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "run.toml").open("wb") as opened:
        opened.truncate(2**30)
    with pytest.raises(ConfigError, match="it is larger than"):
        load_config(RunConfig, tmp_path / "run.toml")
