"""``admtrt train``."""

from __future__ import annotations

import json
import re

import pytest
from training_runs import tiny_config, weights
from typer.testing import CliRunner

from admtrt.commands.train import train_app
from admtrt.config_files import load_config, save_config
from admtrt.errors import ConfigError, UserError
from admtrt.run_config import RunConfig
from admtrt.training.learner import Learner


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "run.toml"
    save_config(tiny_config(steps=2), path)
    return path


def invoke(*arguments):
    """Run ``admtrt train`` and raise its exceptions: messages and exit codes are made one level above."""
    return CliRunner().invoke(train_app, [str(argument) for argument in arguments], catch_exceptions=False)


def resolved(out, kind="unet"):
    return load_config(RunConfig, out / kind / "config.toml")


@pytest.mark.parametrize("kind", ["unet", "classifier", "upsampler"])
def test_each_network_trains(kind, toml, tmp_path):
    result = invoke(kind, toml, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert f"{kind}: trained to step 2" in result.stdout
    assert weights(tmp_path / "out" / f"{kind}.safetensors")
    assert resolved(tmp_path / "out", kind) == tiny_config(steps=2)


def test_the_table_holds_the_main_metrics_only(toml, tmp_path):
    result = invoke("classifier", toml, "--out", tmp_path / "out", "--set", "data.hold_out=0.1")
    assert re.findall(r"^ (\w+) ", result.stdout, re.MULTILINE) == [
        *("metric", "loss", "accuracy", "held_out_loss", "held_out_accuracy"),
        *("images_per_second", "lr", "weights"),
    ]


def test_a_metric_that_is_not_finite_is_shown_as_such(toml, tmp_path, monkeypatch):
    monkeypatch.setattr(Learner, "evaluate", lambda *_: {"loss": float("nan")})
    arguments = ("unet", toml, "--set", "data.hold_out=0.1")
    assert re.search(r"held_out_loss +not finite", invoke(*arguments, "--out", tmp_path / "1").stdout)
    document = json.loads(invoke(*arguments, "--out", tmp_path / "2", "--json").stdout)
    assert document["metrics"]["held_out_loss"] is None
    assert "loss_q3" in document["metrics"]


def test_json_is_one_document(toml, tmp_path):
    out = tmp_path / "out"
    result = invoke("unet", toml, "--out", out, "--json")
    data = json.loads(result.stdout)
    assert data["kind"] == "unet"
    assert data["step"] == data["metrics"]["step"] == 2
    assert data["weights"] == [str(out / "unet.safetensors")]
    assert data["folder"] == str(out / "unet")


def test_flags_stand_above_set_which_stands_above_the_file(toml, tmp_path):
    out = tmp_path / "out"
    invoke(
        *("classifier", toml, "--out", out, "--steps", 3, "--batch-size", 4, "--lr", 0.005),
        *("--precision", "bf16", "--seed", 7),
        *("--set", "train_classifier.steps=9", "--set", "train_classifier.weight_decay=0.25"),
    )
    settings = resolved(out, "classifier").train_classifier
    assert (settings.steps, settings.batch_size, settings.lr) == (3, 4, 0.005)
    assert (settings.precision, settings.seed, settings.weight_decay) == ("bf16", 7, 0.25)
    assert resolved(out, "classifier").train_unet == tiny_config(steps=2).train_unet


def test_data_names_another_source(toml, tmp_path):
    missing = tmp_path / 'a "quoted" folder'
    with pytest.raises(UserError, match="quoted"):
        invoke("unet", toml, "--out", tmp_path / "out", "--data", missing)
    assert not (tmp_path / "out").exists()


def test_resume_and_overwrite_reach_the_run(toml, tmp_path):
    out = tmp_path / "out"
    invoke("unet", toml, "--out", out)
    with pytest.raises(UserError, match="already exists"):
        invoke("unet", toml, "--out", out)
    assert "trained to step 3" in invoke("unet", toml, "--out", out, "--resume", "--steps", 3).stdout
    assert "trained to step 2" in invoke("unet", toml, "--out", out, "--overwrite").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "train_unet.stepz=3"], "did you mean 'steps'"),
        (["--lr", "nan"], "train_unet.lr"),
        (["--steps", "0"], "train_unet.steps"),
        (["--precision", "fp8"], "train_unet.precision"),
        (["--set", "nonsense"], "section.key=value"),
    ],
)
def test_bad_settings_are_explained(arguments, message, toml, tmp_path):
    with pytest.raises(ConfigError, match=message):
        invoke("unet", toml, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_a_missing_section_is_named(toml, tmp_path):
    text = toml.read_text()
    start = text.index("[classifier]")
    toml.write_text(text[:start] + text[text.index("[upsampler]") :])
    with pytest.raises(ConfigError, match=r"no section \[classifier\]"):
        invoke("classifier", toml, "--out", tmp_path / "out")


@pytest.mark.parametrize("kind", ["unet", "classifier", "upsampler"])
def test_help_names_the_sections(kind):
    for arguments in (["--help"], [kind, "--help"]):
        text = " ".join(invoke(*arguments).stdout.replace("\u2502", " ").split())
        assert f"of section '{kind}' with the settings of section 'train_{kind}'." in text


def test_help_needs_no_torch():
    from training_runs import in_python

    script = (
        "import sys; from typer.testing import CliRunner; from admtrt.commands.train import train_app; "
        "result = CliRunner().invoke(train_app, ['unet', '--help']); "
        "print(result.exit_code, 'torch' in sys.modules)"
    )
    assert in_python("-c", script).split() == ["0", "False"]
