"""Folders of diffusers' all the way: export, convert, verify, sample, without a socket."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import diffusers_goldens as goldens
import numpy as np
import onnx
import pytest
import torch
from goldens import generated_weights, relative_error
from onnx_graphs import proto
from onnx_graphs import session as session_of

from admtrt.bundle import Bundle
from admtrt.cli import run
from admtrt.config import ClassifierConfig
from admtrt.export.cpu_form import cpu_form
from admtrt.export.engine_form import engine_form
from admtrt.export.graphs import classifier_gradient_graph
from admtrt.models.classifier import Classifier, log_prob_gradient
from admtrt.runtime.pipeline import Pipeline

SCHEDULER = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "beta_schedule": "sigmoid",
    "num_train_timesteps": 200,
    "variance_type": "fixed_large",
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


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, its converted file and the bundles of both."""
    path = tmp_path_factory.mktemp("exported")
    goldens.write_tiny(path / "folder", scheduler=SCHEDULER)
    assert run(["convert", str(path / "folder"), str(path / "unet.safetensors")]) == 0
    for source, name in (("folder", "bundle"), ("unet.safetensors", "converted")):
        assert run(["export", str(path / source), "--out", str(path / name)]) == 0
    return path


def test_folder_and_converted_file_give_one_bundle(exported: Path) -> None:
    first, second = (
        json.loads((exported / name / "manifest.json").read_text()) for name in ("bundle", "converted")
    )
    assert first == second  # with the hash of every file
    assert first["threshold_quantile"] == 0.9
    assert first["sampler"] | {"threshold": "dynamic", "threshold_max": 1.2} == first["sampler"]
    assert first["network"]["downsample_padding"] == "after"
    assert first["diffusion"]["zero_terminal_snr"] is True


def test_bundle_agrees_with_its_folder(exported: Path) -> None:
    arguments = ["verify", str(exported / "bundle"), "--unet", str(exported / "folder"), "--steps", "4"]
    assert run(arguments) == 0


def test_samples(exported: Path, tmp_path: Path) -> None:
    bundle, out = str(exported / "bundle"), str(tmp_path / "samples")
    drawn = ["sample", bundle, "--out", out, "--num", "2", "--steps", "trailing:5", "--method", "ddim"]
    assert run([*drawn, "--direction", "network"]) == 0
    pipeline = Pipeline.from_bundle(bundle)
    chosen: dict[str, Any] = {"seeds": [0, 1], "steps": "trailing:5", "method": "ddim"}
    made = pipeline(**chosen, direction="network")
    np.testing.assert_array_equal(np.load(tmp_path / "samples/samples.npz")["arr_0"], made.images)
    assert np.abs(made.x - pipeline(**chosen).x).max() > 0.01
    bounded = pipeline(**chosen, clip=0.5)
    assert np.abs(bounded.x).max() <= 0.5 + 1e-6
    largest = [pipeline(seeds=[0, 1], steps="5", threshold_max=most).x for most in (1.2, 1.0)]
    assert np.abs(largest[0] - largest[1]).max() > 0.01


def test_verify_sees_another_process(exported: Path, tmp_path: Path) -> None:
    folder = goldens.write_tiny(
        tmp_path / "folder", scheduler=SCHEDULER | {"dynamic_thresholding_ratio": 0.8, "beta_end": 0.03}
    )
    arguments = ["verify", str(exported / "bundle"), "--unet", str(folder), "--steps", "2"]
    assert run(arguments) == 1
    assert Bundle.open(exported / "bundle").manifest.threshold_quantile == 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler", [{}, SCHEDULER, {"prediction_type": "sample", "clip_sample_range": 0.5}]
)
def test_every_solver(scheduler: dict[str, Any], tmp_path: Path) -> None:
    folder = goldens.write_tiny(tmp_path / "folder", scheduler=scheduler)
    bundle = tmp_path / "bundle"
    assert run(["export", str(folder), "--out", str(bundle)]) == 0
    assert run(["verify", str(bundle), "--unet", str(folder), "--steps", "5", "--all-solvers"]) == 0


@pytest.mark.slow
def test_consistency_model(tmp_path: Path) -> None:
    folder = goldens.write_tiny(
        tmp_path / "folder", scheduler={"_class_name": "CMStochasticIterativeScheduler"}
    )
    bundle = str(tmp_path / "bundle")
    assert run(["export", str(folder), "--out", bundle]) == 0
    assert run(["verify", bundle, "--unet", str(folder)]) == 0
    for steps in ("1", "2"):
        out = str(tmp_path / steps)
        assert run(["sample", bundle, "--out", out, "--num", "2", "--steps", steps]) == 0


@pytest.mark.parametrize("form", ["cpu", pytest.param("engine", marks=pytest.mark.slow)])
def test_gradient_of_a_classifier_with_the_same_options(form: str) -> None:
    """An odd size is rounded down if padding is only after the image."""
    config = ClassifierConfig(
        image_size=7,
        in_channels=1,
        model_channels=8,
        num_res_blocks=1,
        channel_mult=(1, 2),
        attention_resolutions=(3,),
        num_head_channels=8,
        resblock_updown=False,
        downsample_padding="after",
        frequency_shift=1,
        norm_eps=1e-3,
        norm_groups=4,
        num_classes=5,
    )
    assert config.level_sizes == (7, 3)
    classifier = generated_weights(Classifier(config))
    model = classifier_gradient_graph(classifier)
    session = session_of(proto(cpu_form(model) if form == "cpu" else engine_form(model)))
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((3, 1, 7, 7)) * np.array([1, 1, 0.01]).reshape(3, 1, 1, 1)).astype(np.float32)
    t, y = np.array([0, 421, 999], np.float32), np.array([4, 0, 2])
    grad, _ = session.run(["grad", "log_prob"], {"x": x, "t": t, "y": y})
    exact = classifier.double()
    exact.timestep_embedding.frequencies = exact.timestep_embedding.frequencies.double()
    expected = log_prob_gradient(
        exact, *map(torch.from_numpy, (x.astype(np.float64), t.astype(np.float64), y))
    )
    assert relative_error(grad, expected.numpy()) < 2e-5


def test_padding_behind_the_image_is_no_node(exported: Path) -> None:
    graph = onnx.load(exported / "bundle/unet.onnx", load_external_data=False).graph
    assert "Pad" not in {node.op_type for node in graph.node}
    strided = [
        {attribute.name: list(attribute.ints) for attribute in node.attribute}
        for node in graph.node
        if node.op_type == "Conv"
    ]
    assert [0, 0, 1, 1] in [one["pads"] for one in strided if one.get("strides") == [2, 2]]
