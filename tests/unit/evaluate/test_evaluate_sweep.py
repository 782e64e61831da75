"""`admtrt evaluate sweep`, small: what is drawn, judged, kept and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import exported_bundle
from feature_networks import features_folder, pictures

from admtrt.cli import run
from admtrt.evaluate.compare import Value
from admtrt.evaluate.figure import save_figure
from admtrt.evaluate.judging import Judged
from admtrt.evaluate.sweep import Point, Row, points
from admtrt.schedule.sampler import SamplerConfig


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
    assert [row["guided_evaluations"] for row in shown["rows"]] == [0, 3, 1, 0, 3, 2]
    distances = [row["features"][0]["metrics"]["fid"]["value"] for row in shown["rows"]]
    assert len(set(distances)) == 6  # every choice changes the samples
    assert shown["rows"][0]["features"][0]["floor"]["fid"]["samples"] == 12
    kept = (tmp_path / "sweep" / "sweep.json").read_text()
    assert json.loads(kept)["rows"] == shown["rows"]
    assert (tmp_path / "sweep" / "sweep-inception.png").stat().st_size > 10_000
    assert run([*arguments, *choices, "--json"]) == 0  # nothing is drawn again
    assert (tmp_path / "sweep" / "sweep.json").read_text() == kept


def test_the_table_has_errors_and_what_is_guided(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    choices = ["--scale", "2", "--method", "ddim", "--steps", "4,6", "--metrics", "kid"]
    assert run([*arguments, *choices, "--guidance-interval", "0.1:50"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line[1:] for line in lines if "±" in line}
    assert rows["ddim-steps4-scale2-fp32-sigma0.1to50"][0] == "2/4"
    kept = json.loads((Path(arguments[-3]) / "sweep.json").read_text())["rows"][0]
    kid = kept["features"][0]["metrics"]["kid"]
    assert rows[kept["name"]][1:4] == [f"{kid['value']:.4f}", "±", f"{kid['error']:.4f}"]


@pytest.mark.parametrize(
    ("choices", "title", "places", "labels"),
    [
        (
            [("ddim", 5, 0.0, None), ("ddim", 5, 2.0, None), ("ddim", 5, 2.0, (0.5, 3.0))],
            "guidance scale",
            [[0.0, 2.0], [0.0, 2.0]],
            ["ddim, 5 evaluations, fp32", "ddim, 5 evaluations, fp32, sigma 0.5 to 3"],
        ),
        (
            [("dpmpp", 9, 2.0, None), ("dpmpp", 5, 2.0, None), ("ddim", 5, 2.0, None)],
            "evaluations of the networks",
            [[5, 9], [5]],
            ["dpmpp, scale 2, fp32", "ddim, scale 2, fp32"],
        ),
    ],
)
def test_the_figure_is_against_what_varies(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    choices: list[tuple[str, int, float, tuple[float, float] | None]],
    title: str,
    places: list[list[float]],
    labels: list[str],
) -> None:
    """Against evaluations if all scales are equal; else rows without guidance belong to every interval."""
    from matplotlib.figure import Figure

    metrics = {"kid": Value(0.5, 0.1, 10)}
    rows = []
    for method, count, scale, interval in choices:
        sampler = SamplerConfig.from_dict({"method": method, "steps": str(count), "scale": scale})
        judged = Judged("judge", {}, metrics, None, None, [], None)
        rows.append(Row(Point(method, str(count), scale, "fp32", interval), sampler, count, 0, [judged]))
    drawn: list[Figure] = []
    original = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.append(self), original(self, *a, **k))
    )
    save_figure(rows, 0, tmp_path / "figure.png")
    (panel,) = drawn[0].axes
    assert panel.get_xlabel() == title
    lines = panel.containers  # each an error bar
    assert [line[0].get_xdata().tolist() for line in lines] == places
    assert [line.get_label() for line in lines] == labels


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
