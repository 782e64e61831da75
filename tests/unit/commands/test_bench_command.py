"""``admtrt bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bundles import CLASSIFIER, UNET, exported_bundle, network, sham_bundle

from admtrt.cli import run
from admtrt.models.checkpoint import save_checkpoint

Capture = pytest.CaptureFixture[str]


def stored(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Checkpoints of the tiny guided bundle, the UNet's settings changed."""
    paths = folder / "unet.safetensors", folder / "classifier.safetensors"
    for path, config in zip(paths, (UNET.model_copy(update=changes), CLASSIFIER), strict=True):
        loaded = network(config)
        save_checkpoint(path, loaded.module.state_dict(), loaded.config)
    return paths


def test_two_rows_and_a_peer_that_is_absent(tmp_path: Path, capsys: Capture) -> None:
    """One repetition each, in real processes."""
    unet, classifier = stored(tmp_path)
    rows = ["--backend", "torch", "--backend", "onnxruntime", "--backend", "original"]
    places = ["--unet", unet, "--classifier", classifier, "--out", tmp_path / "out"]
    options = ["--repeat", "1", "--batch", "2", "--threads", "1", "--sampling", "2", "--json"]
    arguments = ["bench", exported_bundle("guided"), *places, *rows, *options]
    assert run([str(argument) for argument in arguments]) == 0
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    eager, exported, absent = data["rows"]
    assert [row["name"] for row in data["rows"]] == ["torch", "onnxruntime", "original"]
    assert absent["step"] is None
    assert "Give its checkout with --original" in absent["reason"]
    assert eager["errors"] == {}
    assert 0 <= exported["errors"]["out"] < 1e-4
    assert 0 <= exported["errors"]["grad"] < 1e-4
    for row in (eager, exported):
        assert row["batch"] == 2
        assert row["reason"] == ""
        assert row["step"]["count"] == 1
        assert 0 < row["unet"]["median"] < row["step"]["median"]
        assert row["memory"] > 2**20
        assert row["ready"] > 0
        assert row["sampling"] > 0
        assert row["of_peak"] > 0
    assert eager["ratio"] == 1
    assert data["baseline"] == {"2": "torch fp32"}
    assert data["reference"] == {"2": "torch fp32"}
    assert data["operations"]["unet"] > 0
    assert data["peaks"]["fp32"] > 0
    assert data["nodes"]["bundle"]["unet"] > 0
    assert data["machine"]["threads"] == 1
    assert set(data["startup"]) >= {"import admtrt", "open it again"}
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == data
    assert "| onnxruntime fp32 |" in (tmp_path / "out" / "bench.md").read_text()
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_bundle_that_cannot_run_gives_a_table_of_reasons(tmp_path: Path, capsys: Capture) -> None:
    bundle = sham_bundle(tmp_path / "bundle").path
    options = ["--backend", "onnxruntime", "--repeat", "1", "--threads", "1"]
    assert run(["bench", str(bundle), *options]) == 1
    assert "ONNX Runtime refuses" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "give a bundle, --preset, --training or --features"),
        (["BUNDLE", "--preset", "64x64_diffusion"], "give a bundle, --preset, --training or --features"),
        (["--preset", "65x65_diffusion"], "there is no preset '65x65_diffusion'"),
        (["--preset", "64x64_classifier"], "there is no preset '64x64_classifier' to sample from"),
        (["--preset", "64x64_diffusion", "--unet", "x"], "a preset has generated weights"),
        (["BUNDLE", "--batch", "0"], "--batch is 0"),
        (["BUNDLE", "--repeat", "0"], "--repeat is 0"),
        (["BUNDLE", "--sampling", "0"], "--sampling is 0"),
        (["BUNDLE", "--threads", "-1"], "threads is -1; expected 1 to 1024"),
        (["BUNDLE", "--threads", "5000"], "threads is 5000"),
        (["BUNDLE", "--sampling", "1001"], "steps '1001': section 1 has 1000 timesteps"),
        (["BUNDLE", "--work", "UNET"], "cannot write"),
        (["BUNDLE", "--backend", "onnxruntime", "--plans", "plans"], "no row runs plans, but plans"),
        (["BUNDLE", "--backend", "caffe"], "there is no backend 'caffe'"),
        (["BUNDLE", "--backend", "onnxruntime:fp16"], "has no precision 'fp16'"),
        (["BUNDLE", "--original", "BUNDLE"], "no checkout of the original"),
        (["nowhere"], "nowhere does not exist"),
        (["BUNDLE", "--unet", "UNET"], "no classifier was given, but"),
        (["BUNDLE", "--classifier", "CLASSIFIER"], "a classifier was given without its UNet"),
        (["BUNDLE", "--unet", "OTHER", "--classifier", "CLASSIFIER"], "is not the bundle's unet"),
        (["BUNDLE", "--unet", "CLASSIFIER", "--classifier", "CLASSIFIER"], "holds a network of kind"),
    ],
)
def test_bad_input(arguments: list[str], complaint: str, tmp_path: Path, capsys: Capture) -> None:
    unet, classifier = stored(tmp_path)
    (tmp_path / "other").mkdir()
    places = {
        "BUNDLE": exported_bundle("guided"),
        "UNET": unet,
        "CLASSIFIER": classifier,
        "OTHER": stored(tmp_path / "other", num_res_blocks=2)[0],
    }
    assert run(["bench", *(str(places.get(argument, argument)) for argument in arguments)]) == 2
    shown, said = capsys.readouterr()
    assert shown == ""
    assert complaint in said
    assert "Traceback" not in said
