"""The scripts in tools/ on tiny models."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import pytest
import torch
from bundles import CLASSIFIER, exported_bundle, network
from PIL import Image

from admtrt import demo
from admtrt.config_files import load_config
from admtrt.models.checkpoint import load_network
from admtrt.models.generated import generated_weight
from admtrt.run_config import RunConfig

TOOLS = Path(__file__).parents[2] / "tools"
DIGITS = "[data]\nsource = 'digits'\nimage_size = 8\nchannels = 1\nhold_out = 0.1\n"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def call(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    try:
        module.main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


@pytest.mark.slow
def test_commands_that_are_killed_lose_leave_and_change_nothing() -> None:
    done = subprocess.run(
        [sys.executable, TOOLS / "kill_test.py", "--kills", "30", "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    found = json.loads(done.stdout)
    assert (done.returncode, found["faults"]) == (0, 0), found
    assert found["kills"] == 30
    assert {name for name, tally in found["commands"].items() if tally["repeats"]} == {
        "train", "sample", "export", "convert", "build", "evaluate", "judge",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["64x64_classifier", "out.safetensors"], "expected a name that ends in .pt"),
        (["c.toml", "out.pt"], "expected a name that ends in .safetensors"),
        (["c.toml", "out.safetensors", "--half"], "--half is for presets"),
        (["64x64_classifier", "out.pt", "--kind", "unet"], "--kind is for a TOML"),
        (["65x65_diffusion", "out.pt"], "no preset '65x65_diffusion'; did you mean '64x64_diffusion'"),
    ],
)
def test_generated_checkpoints_that_cannot_be(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(load("generated_checkpoint", monkeypatch), monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_int8_of_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = load("explore_int8", monkeypatch)
    assert call(tool, monkeypatch, tmp_path / "nowhere") == 2
    assert "does not exist" in capsys.readouterr().err
    assert call(tool, monkeypatch, exported_bundle("upsampler")) == 2
    assert "is an upsampler's" in capsys.readouterr().err


def test_settings_of_cpu_backends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tool, bundle = load("cpu_settings", monkeypatch), exported_bundle("guided")
    assert call(tool, monkeypatch, bundle, "--batch", 2, "--repeat", 1) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in shown] == ["unet, batch 2", "classifier_gradient, batch 2"]
    assert call(tool, monkeypatch, bundle, "--setting", "no arena") == 0
    assert capsys.readouterr().out.startswith("no arena: ")
    for arguments in ((tmp_path,), (bundle, "--batch", 3), (exported_bundle("upsampler"),)):
        assert call(tool, monkeypatch, *arguments) == 2


def test_upsampler_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool, config, grid = load("upsampler_error", monkeypatch), tmp_path / "c.toml", tmp_path / "grid.png"
    config.write_text(DIGITS)
    bundle = exported_bundle("upsampler")
    options = ["--images", 3, "--steps", "ddim2", "3", "--grid", grid]
    assert call(tool, monkeypatch, bundle, config, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| 3 held-out images |")
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| bilinear",
        "| upsampler, DDIM 2 steps",
        "| upsampler, DDPM 3 steps",
    ]
    errors = [float(line.split(" | ")[1].split(" ± ")[0]) for line in lines[2:]]
    assert errors[0] < errors[1] != errors[2]  # its weights were never trained
    with Image.open(grid) as image:
        assert image.width > image.height  # three rows of four


def test_what_the_upsampler_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows have the images' squared errors: 0 for the same image, the square of a shift."""
    tool = load("upsampler_error", monkeypatch)
    x_0 = np.linspace(-1, 1, 2 * 64, dtype=np.float32).reshape(2, 1, 8, 8)
    assert tool.row("same", x_0, x_0) == "| same | 0.0000 ± 0.0000 |  |"
    assert tool.row("shifted", x_0 + 0.5, x_0, 2.6) == "| shifted | 0.2500 ± 0.0000 | 3 |"
    half = x_0 + np.array([0.5, 0.0], np.float32).reshape(2, 1, 1, 1)
    assert tool.row("one", half, x_0) == "| one | 0.1250 ± 0.1250 |  |"
    flat = tool.Task(x_0, np.full((2, 4, 4, 1), 255, np.uint8), None).bilinear()
    np.testing.assert_array_equal(flat, np.ones_like(x_0))


def test_upsampler_error_names_a_users_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool, config = load("upsampler_error", monkeypatch), tmp_path / "c.toml"
    config.write_text(DIGITS)
    assert call(tool, monkeypatch, exported_bundle("guided"), config) == 2
    assert "is no upsampler" in capsys.readouterr().err
    assert call(tool, monkeypatch, exported_bundle("upsampler"), config, "--images", 10_000) == 2
    assert "10000 images were asked for; there are 179" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "dtype"), [([], torch.float32), (["--half"], torch.float16)])
def test_generated_checkpoint(
    options: list[str], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a preset that is made small here: it loads as a published file does, and no weight is zero."""
    tool, path = load("generated_checkpoint", monkeypatch), tmp_path / "a.pt"
    config = network(CLASSIFIER).config
    monkeypatch.setattr(tool, "checkpoint_config_from_preset", lambda name: config)
    assert call(tool, monkeypatch, "some preset", path, *options) == 0
    stored = torch.load(path, weights_only=True)
    assert {value.dtype for value in stored.values()} == {dtype}
    loaded = load_network(path, kind="classifier", config=config).module
    for name, value in loaded.named_parameters():
        expected = torch.from_numpy(generated_weight(name, tuple(value.shape))).to(dtype).float()
        assert torch.equal(value, expected)
        assert value.any()


@pytest.mark.parametrize("kind", ["unet", "classifier"])
def test_generated_checkpoint_of_a_run(
    kind: Literal["unet", "classifier"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, path = load("generated_checkpoint", monkeypatch), tmp_path / "a.safetensors"
    config = Path(demo.__file__).parent / "digits.toml"
    assert call(tool, monkeypatch, config, path, "--kind", kind) == 0
    loaded = load_network(path, kind=kind)
    assert loaded.config.network == getattr(load_config(RunConfig, config), kind)
    assert all(value.any() for value in loaded.module.parameters())


def test_generated_checkpoint_of_a_run_without_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool, config = load("generated_checkpoint", monkeypatch), tmp_path / "c.toml"
    config.write_text(DIGITS)
    assert call(tool, monkeypatch, config, tmp_path / "a.safetensors", "--kind", "classifier") == 2
    assert "has no section [classifier]" in capsys.readouterr().err


def test_generated_checkpoint_names_a_users_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool, path = load("generated_checkpoint", monkeypatch), tmp_path / "a.pt"
    assert call(tool, monkeypatch, "65x64_diffusion", path) == 2
    assert "did you mean '64x64_diffusion'?" in capsys.readouterr().err
    path.write_bytes(b"mine")
    assert call(tool, monkeypatch, "64x64_classifier", path) == 2
    assert "already exists" in capsys.readouterr().err
    assert path.read_bytes() == b"mine"


def test_generated_checkpoint_replaces_a_file_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, path = load("generated_checkpoint", monkeypatch), tmp_path / "a.pt"
    monkeypatch.setattr(tool, "checkpoint_config_from_preset", lambda name: network(CLASSIFIER).config)
    path.write_bytes(b"old")
    assert call(tool, monkeypatch, "some preset", path, "--overwrite") == 0
    assert torch.load(path, weights_only=True)


def test_gradient_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Right and wrong graphs are told apart, and a case that ends its process costs one row."""
    monkeypatch.syspath_prepend(TOOLS)
    measure, cases = load("gradient_measure", monkeypatch), load("gradient_cases", monkeypatch)
    table = load("gradient_table", monkeypatch)
    export = measure.export_input_gradient

    def case(scale: float = 1.0) -> object:
        doubled = cases.Calls(lambda x: (scale * x.sin()).sum(1))
        return cases.Case(doubled, {"x": cases.normal(3)})

    def absent() -> object:
        raise ImportError("no package of that name")

    found = {"right": measure.measure(case), "absent": measure.measure(absent)}
    monkeypatch.setattr(
        measure,
        "export_input_gradient",
        lambda module, *rest, **more: export(case(1.001).module, *rest, **more),
    )
    found["wrong"] = measure.measure(case)
    monkeypatch.setattr(table, "CASES", {"ends": lambda: os._exit(3), **dict.fromkeys(found, case)})
    results = tmp_path / "results.json"
    results.write_text(json.dumps(found))
    monkeypatch.setattr(table, "measure", lambda factory: factory() and {"outcome": "right"})
    monkeypatch.setattr(table, "OPERATORS", {"op/amax": case})
    monkeypatch.setattr(table, "CASES", {**table.CASES, "op/amax": case})
    assert call(table, monkeypatch, results) == 0
    outcomes = {name: row["outcome"] for name, row in json.loads(results.read_text()).items()}
    assert outcomes == {
        "right": "right", "absent": "right", "wrong": "WRONG", "ends": "failed", "op/amax": "right",
    }  # fmt: skip
    assert found["absent"]["outcome"] == "not installed"  # and measured once there is such a package
    printed = capsys.readouterr().out
    assert "4 models and losses: 2 right, 1 failed, 1 WRONG" in printed.replace(
        "1 WRONG, 1 failed", "1 failed, 1 WRONG"
    )
    assert "| wrong | WRONG | 1e-03 / 1e-03 / 1e-03 |" in printed
