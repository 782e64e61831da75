"""Refusals of `admtrt export --engine`, and the settings it passes on; nothing is exported here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from bundles import UNET, network, sham_bundle

from admtrt.cli import run
from admtrt.export import pack
from admtrt.export.precision import DEFAULT_ISLANDS, ISLANDS
from admtrt.models.checkpoint import save_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    loaded = network(UNET)
    save_checkpoint(tmp_path / "unet.safetensors", loaded.module.state_dict(), loaded.config)
    return tmp_path / "unet.safetensors"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "int8"], "--engine 'int8' is unknown; expected fp32, fp16, bf16"),
        (["--engine", "fp16", "--fp32", "norms"], "--fp32 'norms' is unknown; expected some of group_norm,"),
        (["--engine", "fp16", "--fp32", ""], "--fp32 '' is unknown"),
        (
            ["--fp32", "softmax"],
            "--fp32 says what stays float32 in fp16 and bf16 engine graphs, but none is made",
        ),
        (["--engine", "fp32", "--fp32", "none"], "but none is made"),
    ],
)
def test_refused(
    options: list[str], message: str, unet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(unet), "--out", str(tmp_path / "b"), *options]) == 2
    shown, complaint = capsys.readouterr()
    assert (shown, message in complaint) == ("", True), complaint
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "engines", "islands"),
    [
        ([], [], DEFAULT_ISLANDS),
        (["--engine", "bf16", "--engine", "fp16", "--engine", "bf16"], ["fp16", "bf16"], DEFAULT_ISLANDS),
        (["--engine", "fp16", "--fp32", "none"], ["fp16"], ()),
        (["--engine", "fp16", "--fp32", "output, softmax"], ["fp16"], ("softmax", "output")),
        (["--engine", "fp16", "--fp32", ",".join(ISLANDS)], ["fp16"], ISLANDS),
    ],
)
def test_passed_on(
    options: list[str],
    engines: list[str],
    islands: tuple[str, ...],
    unet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}

    def exported(*_: Any, **named: Any) -> Any:
        given.update(named)
        return sham_bundle(tmp_path / "sham")

    monkeypatch.setattr(pack, "bundle_from_checkpoints", exported)
    assert run(["export", str(unet), "--out", str(tmp_path / "b"), "--json", *options]) == 0
    assert (given["engines"], given["islands"]) == (engines, islands)
