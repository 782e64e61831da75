"""Folders of diffusers' all the way: export, convert, verify, sample, without a socket."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import diffusers_goldens as goldens
import numpy as np
import pytest

from admtrt.bundle import Bundle
from admtrt.cli import run
from admtrt.runtime.pipeline import Pipeline

ZERO_SNR = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "beta_schedule": "sigmoid",
    "clip_sample_range": 0.5,
    "variance_type": "fixed_large",
}
THRESHOLD = {
    "prediction_type": "sample",
    "num_train_timesteps": 200,
    "thresholding": True,
    "sample_max_value": 1.2,
    "dynamic_thresholding_ratio": 0.9,
}


@pytest.fixture(autouse=True)
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def test_folder_and_converted_file_give_one_bundle(tmp_path: Path) -> None:
    folder = goldens.write_tiny(tmp_path / "folder", scheduler=THRESHOLD)
    converted = tmp_path / "unet.safetensors"
    assert run(["convert", str(folder), str(converted)]) == 0
    for source, name in ((folder, "a"), (converted, "b")):
        assert run(["export", str(source), "--out", str(tmp_path / name)]) == 0
    first, second = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in "ab")
    assert first == second  # with the hash of every file
    assert first["threshold_quantile"] == 0.9
    assert first["sampler"] | {"threshold": "dynamic", "threshold_max": 1.2} == first["sampler"]
    assert first["network"]["downsample_padding"] == "after"
    assert run(["verify", str(tmp_path / "a"), "--unet", str(folder), "--steps", "4"]) == 0
    assert run(["inspect", str(tmp_path / "a")]) == 0


def test_process_without_last_signal(tmp_path: Path) -> None:
    folder = goldens.write_tiny(tmp_path / "folder", scheduler=ZERO_SNR)
    bundle = tmp_path / "bundle"
    assert run(["export", str(folder), "--out", str(bundle)]) == 0
    assert run(["verify", str(bundle), "--unet", str(folder), "--steps", "4"]) == 0
    samples = tmp_path / "samples"
    drawn = ["sample", str(bundle), "--out", str(samples), "--num", "2", "--steps", "trailing:5"]
    assert run([*drawn, "--method", "ddim", "--direction", "network"]) == 0
    pipeline = Pipeline.from_bundle(bundle)
    made = pipeline(seeds=[0, 1], steps="trailing:5", method="ddim", direction="network")
    np.testing.assert_array_equal(np.load(samples / "samples.npz")["arr_0"], made.images)
    other = pipeline(seeds=[0, 1], steps="trailing:5", method="ddim")
    assert np.abs(made.x - other.x).max() > 0.01
    assert np.abs(made.x).max() <= 0.5 + 1e-6  # the folder's range


def test_verify_sees_another_quantile(tmp_path: Path) -> None:
    folder = goldens.write_tiny(tmp_path / "folder", scheduler=THRESHOLD)
    bundle = tmp_path / "bundle"
    assert run(["export", str(folder), "--out", str(bundle)]) == 0
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dynamic_thresholding_ratio": 0.8}))
    assert run(["verify", str(bundle), "--unet", str(folder), "--steps", "4"]) == 1
    assert Bundle.open(bundle).manifest.threshold_quantile == 0.9


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [ZERO_SNR, THRESHOLD, {}])
def test_every_solver(scheduler: dict[str, Any], tmp_path: Path) -> None:
    folder = goldens.write_tiny(tmp_path / "folder", scheduler=scheduler)
    bundle = tmp_path / "bundle"
    assert run(["export", str(folder), "--out", str(bundle)]) == 0
    verify = ["verify", str(bundle), "--unet", str(folder), "--steps", "5", "--all-solvers"]
    assert run(verify) == 0
