"""`admtrt evaluate sweep` and `features judge`, small: what is drawn, judged, kept and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import exported_bundle
from feature_networks import features_folder, pictures

from admtrt.cli import run
from admtrt.evaluate.sweep import Point, points


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    np.savez(tmp_path / "r.npz", arr_0=pictures(60, 2, channels=1))
    np.savez(tmp_path / "f.npz", arr_0=pictures(30, 3, channels=1))
    given = ["evaluate", "sweep", str(exported_bundle("guided")), "--count", "12", "--batch-size", "6"]
    given += ["--reference", str(tmp_path / "r.npz"), "--features", str(features_folder(tmp_path / "i"))]
    return [*given, "--floor", str(tmp_path / "f.npz"), "--out", str(tmp_path / "sweep"), "--threads", "1"]


def test_points_are_a_product_without_repeats() -> None:
    found = points(["ddim"], ["2", "4"], [0.0, 1.0], ["fp32"], [None, (0.3, 3.0)])
    assert len(found) == 6  # at scale 0 there is no interval
    assert Point("ddim", "4", 1.0, "fp32", (0.3, 3.0)) in found
    assert len({point.name for point in found}) == 6


def test_sweep(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choices = ["--scale", "0,2", "--method", "ddim,dpmpp", "--steps", "3"]
    choices += ["--guidance-interval", "none,0.1:50", "--no-error"]
    assert run([*arguments, *choices, "--json"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [(row["sampler"]["method"], row["evaluations"], row["scale"]) for row in shown["rows"]] == [
        ("ddim", 3, 0.0), ("ddim", 3, 2.0), ("ddim", 3, 2.0),
        ("dpmpp", 3, 0.0), ("dpmpp", 3, 2.0), ("dpmpp", 3, 2.0),
    ]  # fmt: skip
    assert [row["guidance_interval"] for row in shown["rows"]] == [None, None, [0.1, 50.0]] * 2
    distances = [row["features"][0]["metrics"]["fid"]["value"] for row in shown["rows"]]
    assert len(set(distances)) == 6  # every choice changes the samples
    assert shown["rows"][0]["features"][0]["floor"]["fid"]["samples"] == 12
    kept = (tmp_path / "sweep" / "sweep.json").read_text()
    assert json.loads(kept)["rows"] == shown["rows"]
    assert (tmp_path / "sweep" / "sweep-inception.png").stat().st_size > 10_000
    assert run([*arguments, *choices, "--json"]) == 0  # nothing is drawn again
    assert (tmp_path / "sweep" / "sweep.json").read_text() == kept


def test_a_sweep_that_was_cut_off_goes_on(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from admtrt.runtime.pipeline import Pipeline

    choices = ["--scale", "0,2", "--method", "unipc", "--steps", "2", "--order", "1"]
    drawn, original = 0, Pipeline.draw

    def cut(self: Pipeline, *given: Any, **named: Any) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn == 4:
            raise KeyboardInterrupt
        return original(self, *given, **named)

    monkeypatch.setattr(Pipeline, "draw", cut)
    assert run([*arguments, *choices]) == 130
    assert len(json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]) == 1
    assert run([*arguments, *choices]) == 0
    assert drawn == 5  # four shards, one of them begun twice
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]
    assert [(row["sampler"]["method"], row["sampler"]["order"]) for row in rows] == [("unipc", 1)] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scale", "0,x"], "the scale 'x' is no number"),
        (["--scale", "1,,2"], "an empty entry in --scale"),
        (["--method", "ddim,euclid"], "euclid"),
        (["--method", "unipc,ddim", "--order", "3"], "ddim has no such choice"),
        (["--steps", "2000"], "2000"),
        (["--guidance-interval", "3:0.3"], "is empty"),
        (["--precision", "fp32,fp64"], "fp64"),
        (["--features-backend", "tensorrt"], "'tensorrt' is none of them"),
    ],
)
def test_choices_that_cannot_be(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    """Refused before anything is drawn."""
    assert run([*arguments, *options]) == 2
    assert message in capsys.readouterr().err
    assert not [*tmp_path.glob("sweep/*")]


CONFIG = '[data]\nsource = "digits"\nimage_size = 8\nchannels = 1\nhold_out = 0.5\n'


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CONFIG, ["--seed", "0"], "seed 0 is the guide's own"),
        (CONFIG, ["--part", "train"], "part 'train' is unknown"),
        (CONFIG.replace("0.5", "0.0"), [], "nothing is held out"),
        (CONFIG + 'label_from = "none"\n', [], "has no labels"),
        (CONFIG.replace("= 8", "= 3"), [], "cannot be halved"),
    ],
)
def test_judges_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, options: list[str], message: str
) -> None:
    (tmp_path / "run.toml").write_text(config)
    command = ["evaluate", "features", "judge", str(tmp_path / "run.toml"), "--out", str(tmp_path / "judge")]
    assert run([*command, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "judge").exists()


@pytest.mark.slow
def test_judge_on_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It learns, its graph runs, it recognises classes, and it is not trained on the floor."""
    (tmp_path / "run.toml").write_text(CONFIG)
    config = str(tmp_path / "run.toml")
    out = str(tmp_path / "judge")
    command = ["evaluate", "features", "judge", config, "--out", out, "--steps", "150", "--json"]
    assert run(command) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["accuracy"] > 0.8
    assert made["manifest"]["class_names"] == [str(digit) for digit in range(10)]
    evaluate = ["evaluate", "samples", f"{config}:floor", "--reference", f"{config}:train"]
    assert run([*evaluate, "--features", out, "--floor", f"{config}:floor", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["features"][0]
    assert result["metrics"]["accuracy"]["value"] > 0.8
    assert result["metrics"]["judge_score"]["value"] > 3
    assert abs(result["metrics"]["kid"]["value"]) < 5 * result["metrics"]["kid"]["error"]
    assert "judge-saw-floor" not in [warned["code"] for warned in result["warnings"]]
