"""The commands that run plans, on the stub of the driver: a folder of plans, their layers, verification."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import cuda_stub
import numpy as np
import pytest
from bundles import CLASSIFIER, UNET, network
from engine_rig import Rig

from admtrt.cli import run
from admtrt.errors import EngineError
from admtrt.models.checkpoint import save_checkpoint
from admtrt.runtime.trt.layers import Layer, read_layers

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rig:
    """Plans in a folder outside the bundle."""
    monkeypatch.setattr("admtrt.runtime.backends.backend.is_installed", lambda _: True)
    made = Rig(monkeypatch, tmp_path / "plans")
    made.build()
    return made


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    """The exit code, the JSON document and stderr."""
    code = run([str(argument) for argument in arguments])
    shown, said = capsys.readouterr()
    return code, json.loads(shown) if shown else None, said


def test_samples_from_a_folder_of_plans(rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["sample", rig.bundle.path, "--classes", "0:2,1:3", "--batch-size", 4, "--json"]
    on_plans = ["--backend", "tensorrt", "--plans", rig.folder]
    assert command(capsys, *asked, "--out", tmp_path / "ours", *on_plans)[0] == 0
    assert command(capsys, *asked, "--out", tmp_path / "cpu")[0] == 0
    ours, theirs = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("ours", "cpu"))
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert cuda_stub.log()  # it was the GPU that worked


def test_without_the_folder_there_are_no_plans(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["sample", rig.bundle.path, "--out", tmp_path / "run", "--backend", "tensorrt"]
    code, _, said = command(capsys, *given)
    assert code == 2
    assert f"{rig.bundle.path / 'plans'} has no plan of graph 'unet' in fp32" in said


def test_verification_of_plans(rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"unet": network(UNET), "classifier": network(CLASSIFIER)}
    for name, loaded in files.items():
        save_checkpoint(tmp_path / f"{name}.safetensors", loaded.module.state_dict(), loaded.config)
    given = [
        "verify",
        rig.bundle.path,
        "--steps",
        3,
        "--json",
        "--backend",
        "tensorrt",
        "--plans",
        rig.folder,
    ]
    for name in files:
        given += [f"--{name}", tmp_path / f"{name}.safetensors"]
    code, found, _ = command(capsys, *given)
    assert (code, found["passed"], found["backend"]) == (0, True, "tensorrt")
    assert {row["stage"] for row in found["rows"]} >= {"graph", "step", "trajectory", "image"}
    assert cuda_stub.log()


@pytest.mark.parametrize(
    ("rtx", "told"),
    [(False, "Row major linear FP32 format"), (True, "Float, Row major linear")],
)
def test_layers_of_a_plan(
    rtx: bool, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rig = Rig(monkeypatch, tmp_path, rtx=rtx)
    name = next(record.key.digest for record in rig.build() if record.key.graph == "classifier_gradient")
    given = ["inspect", rig.bundle.path, "--plans", rig.folder, "--layers", name[:10]]
    code, found, _ = command(capsys, *given, "--json")
    assert code == 0
    assert found["layers"] == [
        {"name": f"last of {output}", "kind": "kgen", "outputs": [told]} for output in ("grad", "log_prob")
    ]
    assert run(list(map(str, given))) == 0
    assert "last of log_prob" in capsys.readouterr().out


def test_plans_that_cannot_be_used_are_shown_as_such(
    rig: Rig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for record in rig.store.records()[0]:
        file = rig.store.path(record.key)
        if record.key.graph == "unet":
            file.write_bytes(file.read_bytes()[:10])
        elif record.key.graph == "update":
            file.unlink()
        else:
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (rig.folder / f"{'0' * 64}.json").write_text("{}")
    code, found, said = command(capsys, "inspect", rig.bundle.path, "--plans", rig.folder, "--json")
    assert code == 0
    faults = {plan["key"]["graph"]: plan["fault"] for plan in found["plans"]}
    assert "has 10 bytes, its record says" in faults["unet"]
    assert "cannot read the plan" in faults["update"]
    assert "it is not executed" in faults["classifier_gradient"]
    assert f"{'0' * 64}.json" in said
    assert run(["inspect", str(rig.bundle.path), "--plans", str(rig.folder)]) == 0
    assert "usable" in capsys.readouterr().out  # a narrow column may break the line before it
    code, _, said = command(capsys, "inspect", rig.bundle.path, "--plans", tmp_path / "absent")
    assert code == 2
    assert "is no folder of plans" in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zz", "no plans have a name that begins with 'zz'; there are "),
        ("", "7 plans have a name that begins with ''; there are "),
    ],
)
def test_a_plan_that_is_not_one(
    name: str, message: str, rig: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = command(capsys, "inspect", rig.bundle.path, "--plans", rig.folder, "--layers", name)
    assert code == 2
    assert message in said


def test_layers_of_a_plan_for_another_gpu(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from admtrt.runtime.engines.device import Driver, Gpu

    rig.driver(monkeypatch, Driver(cuda="13.1", gpus=(Gpu("Other", 90, 2**30),)))
    name = rig.store.records()[0][0].key.digest
    code, _, said = command(capsys, "inspect", rig.bundle.path, "--plans", rig.folder, "--layers", name)
    assert code == 2
    assert (
        f"plan {name[:12]} cannot be opened on Other (SM90): it was built for GeForce Double (SM89)" in said
    )
    assert "admtrt build BUNDLE --report" in said


def test_layers_of_a_plan_without_details_are_names() -> None:
    assert read_layers('{"Layers": ["conv1", "conv2"]}', "T") == [
        Layer("conv1", "", ()),
        Layer("conv2", "", ()),
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "no JSON"])
def test_an_inspector_that_says_something_else(text: str) -> None:
    with pytest.raises(EngineError, match="the inspector of TensorRT 12 gives no list of layers"):
        read_layers(text, "TensorRT 12")


@pytest.mark.parametrize("given", [["--cache", "{}"], ["--cache={}"]])
def test_the_former_name_of_the_folder_is_taken(
    given: list[str], rig: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["inspect", rig.bundle.path, "--json"]
    code, found, _ = command(capsys, *asked, *(word.format(rig.folder) for word in given))
    assert code == 0
    assert len(found["plans"]) == len(rig.store.records()[0])
    assert command(capsys, *asked)[1]["plans"] == []


@pytest.mark.parametrize("words", ["sample BUNDLE", "evaluate nll", "bench BUNDLE"])
def test_both_names_of_the_folder_are_an_error(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = command(capsys, *words.split(), "--cache=a", "--plans", "b")
    assert code == 2
    assert "--plans and --cache, its former name, were given" in " ".join(said.replace("│", "").split())


def test_the_former_name_is_not_shown_and_not_taken_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sample", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--plans" in shown
    assert "--cache" not in shown
    assert command(capsys, "presets", "--cache", "a")[0] == 2
    assert command(capsys, "inspect", "--", "--cache")[0] == 2  # a file of that name
