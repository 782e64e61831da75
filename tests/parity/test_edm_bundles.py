"""Bundles of processes of kind edm: sampling by the papers, verification, drift, refused requests."""

from __future__ import annotations

import json
import shutil
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import CLASSIFIER, UNET, network

from admtrt.bundle import MANIFEST, Bundle
from admtrt.cli import run
from admtrt.config import EdmConfig
from admtrt.models.checkpoint import LoadedNetwork, save_checkpoint
from admtrt.models.edm import denoise
from admtrt.run_config import sampler_for
from admtrt.runtime.backends.choice import BackendChoice
from admtrt.runtime.noise import initial_noise, step_noise
from admtrt.runtime.pipeline import Pipeline
from admtrt.verify.drift import BINS, measure_drift
from admtrt.verify.stages import verify_bundle

Capture = pytest.CaptureFixture[str]
SHAPE = (1, 8, 8)
ONE_THREAD = BackendChoice(threads=1)
LABELS, SEEDS = [2, 0], [5, 6]
CLOSE = {"rtol": 0, "atol": 5e-5}
"""State and coefficients of the reference are float64. The float32 of the runtime's state, of order 1 after
c_in, moves x~ by up to 80 times its rounding of 6e-8 at the noisiest level: 5e-6, which a step carries on."""


@cache
def trained(*, boundary: bool) -> LoadedNetwork:
    process = EdmConfig(boundary=boundary)
    config = UNET.model_copy(update={"num_classes": 4, "learn_sigma": False})
    return network(config, diffusion=process, sampler=sampler_for(process))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A consistency model, a discrete classifier, a bundle of the former, and one that is not held to it."""
    folder = tmp_path_factory.mktemp("edm")
    for name, loaded in (("cm", trained(boundary=True)), ("guide", network(CLASSIFIER))):
        save_checkpoint(folder / f"{name}.safetensors", loaded.module.state_dict(), loaded.config)
    assert run(["export", str(folder / "cm.safetensors"), "--out", str(folder / "bundle")]) == 0
    shutil.copytree(folder / "bundle", folder / "diffusion")
    plain = trained(boundary=False).config
    manifest = json.loads((folder / "bundle" / MANIFEST).read_text())
    manifest |= {"diffusion": plain.diffusion.to_dict(), "sampler": plain.sampler.to_dict()}
    (folder / "diffusion" / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture(params=["bundle", "diffusion"])
def exported(files: Path, request: pytest.FixtureRequest) -> Path:
    return files / str(request.param)


def boundary_of(path: Path) -> bool:
    process = Bundle.open(path).manifest.diffusion
    assert isinstance(process, EdmConfig)
    return process.boundary


def grid(count: int) -> list[float]:
    """Karras et al. 2022, eq. 5, in float64."""
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    return [float((high + i / (count - 1) * (low - high)) ** 7) for i in range(count)]


@torch.no_grad()
def predicted(x: torch.Tensor, sigma: float, *, boundary: bool) -> torch.Tensor:
    module, y = trained(boundary=boundary).module, torch.tensor(LABELS)
    levels = torch.full((len(x),), sigma, dtype=torch.float64)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return module(x.float(), t.float(), y).double()

    return denoise(EdmConfig(boundary=boundary), network, x, levels).clamp(-1, 1)


@pytest.mark.parametrize(("steps", "indices"), [(1, [0, 39]), (2, [0, 22, 39]), (3, [0, 13, 26, 39])])
def test_consistency_sampling_is_algorithm_1(exported: Path, steps: int, indices: list[int]) -> None:
    boundary = boundary_of(exported)
    pipeline = Pipeline.from_bundle(exported, threads=1)
    seen = []
    drawn = pipeline(
        LABELS, SEEDS, method="consistency", steps=steps, callback=lambda step: seen.append(step.index)
    )
    assert seen == list(range(1, steps + 1))
    levels = grid(40)
    x = 80 * torch.from_numpy(initial_noise(SEEDS, SHAPE)).double()
    for place in range(steps):
        x = predicted(x, levels[indices[place]], boundary=boundary)
        if place < steps - 1:
            z = step_noise(SEEDS, [steps - 1 - place] * 2, SHAPE)
            x = x + np.sqrt(levels[indices[place + 1]] ** 2 - 0.002**2) * torch.from_numpy(z)
    np.testing.assert_allclose(drawn.x, x.numpy(), **CLOSE)


def test_heun_is_algorithm_1_of_karras(exported: Path) -> None:
    boundary = boundary_of(exported)
    drawn = Pipeline.from_bundle(exported, threads=1)(LABELS, SEEDS, method="heun", steps=5)
    x = 80 * torch.from_numpy(initial_noise(SEEDS, SHAPE)).double()
    levels = grid(3)
    for sigma, to in pairwise(levels):
        slope = (x - predicted(x, sigma, boundary=boundary)) / sigma
        euler = x + (to - sigma) * slope
        slope = (slope + (euler - predicted(euler, to, boundary=boundary)) / to) / 2
        x = x + (to - sigma) * slope
    x = predicted(x, levels[-1], boundary=boundary)
    np.testing.assert_allclose(drawn.x, x.numpy(), **CLOSE)


def test_the_recommended_sampler_is_what_plain_steps_mean(exported: Path) -> None:
    pipeline = Pipeline.from_bundle(exported, threads=1)
    method, steps = ("consistency", 3) if boundary_of(exported) else ("heun", 7)
    assert pipeline.sampler(steps=steps).method == method
    assert pipeline.sampler().scale == 0


def test_verify(exported: Path) -> None:
    boundary = boundary_of(exported)
    report = verify_bundle(Bundle.open(exported), trained(boundary=boundary), None, backend=ONE_THREAD)
    assert report.passed, [row for row in report.rows if row.status != "pass"]
    assert {"graph", "trajectory", "image"} <= {row.stage for row in report.rows}
    report = verify_bundle(Bundle.open(exported), trained(boundary=not boundary), None, backend=ONE_THREAD)
    row = next(row for row in report.rows if row.status != "pass")
    assert (row.stage, row.detail) == (
        "manifest",
        f"boundary is {boundary!r} in the bundle, {not boundary!r} in the checkpoint",
    )


class Altered:
    """A bundle's graphs with a UNet that is wrong by a known factor."""

    def __init__(self, exact: Any) -> None:
        self._exact = exact

    def run(self, graph: Any, feeds: Any) -> dict[str, Any]:
        results = self._exact.run(graph, feeds)
        return {"out": results["out"] * np.float32(1.01)} if graph == "unet" else results


def test_drift_is_binned_over_noise_levels(exported: Path) -> None:
    pipeline = Pipeline.from_bundle(exported, threads=1)
    report = measure_drift(pipeline.bundle, pipeline.denoiser, Altered(pipeline.denoiser), images=2)
    evaluations = 2 if boundary_of(exported) else 35
    assert (report.axis, len(report.steps)) == ("noise level", evaluations)
    assert [step.timestep for step in report.steps] == [None] * evaluations
    assert report.steps[0].sigma == pytest.approx(80)
    assert len(report.graphs) == (2 if boundary_of(exported) else BINS)
    assert report.graphs[-1].last == pytest.approx(80)
    assert all(graph.mean_error == pytest.approx(0.01, rel=1e-3) for graph in report.graphs)


# --- the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sample bundle --out run --classes 0 --method ddim --steps 10", "samples no process of kind 'edm'"),
        ("sample bundle --out run --classes 0 --method ddpm", "samples no process of kind 'edm'"),
        ("sample bundle --out run --classes 0 --steps ddim25", "takes a number of network evaluations"),
        ("sample bundle --out run --classes 0 --scale 2", "holds no classifier"),
        ("sample bundle --out run --classes 0 --levels 0,22,39 --steps 3", "3 levels are 2 evaluations"),
        ("sample bundle --out run --classes 0 --grid trained --method heun --steps 3", "grid 'trained'"),
        (
            "export cm.safetensors --classifier guide.safetensors --out run",
            "a process of kind 'edm' takes no noisy classifier",
        ),
        ("export cm.safetensors --steps 40 --out run", "40 evaluations of 40 levels; expected at most 39"),
        ("evaluate nll --bundle bundle --data digits", "the bound in bits per dim needs a discrete process"),
        ("evaluate nll --unet cm.safetensors --data digits", "this network's is of kind 'edm'"),
        ("verify bundle --unet cm.safetensors --steps 5", "--steps 5 respaces a discrete process"),
        ("drift bundle --backend openvino --steps ddim25", "network evaluations"),
    ],
)
def test_refusals(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, command: str, message: str
) -> None:
    monkeypatch.chdir(files)
    capsys.readouterr()
    assert run(command.split()) == 2
    shown, complaint = capsys.readouterr()
    assert message in " ".join(complaint.split())
    assert "Traceback" not in complaint
    assert shown == ""
    assert not Path("run").exists()


def test_one_two_and_three_evaluations_and_heun(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(files)
    images = {}
    for name, options in {
        "recommended": "",
        "1": "--steps 1",
        "2": "--steps 2",
        "levels": "--levels 0,22,39",
        "3": "--steps 3",
        "heun": "--method heun --steps 9",
    }.items():
        out = str(tmp_path / name)
        assert run(["sample", "bundle", "--out", out, "--classes", "0:2", *options.split()]) == 0
        images[name] = np.load(next(Path(out).glob("*.npz")))["arr_0"]
    capsys.readouterr()
    for same in ("2", "levels"):
        np.testing.assert_array_equal(images[same], images["recommended"])
    different = [images[name] for name in ("1", "2", "3", "heun")]
    assert all((a != b).any() for i, a in enumerate(different) for b in different[:i])


def test_a_bundle_of_an_unknown_kind(files: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(files / "bundle", copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    assert manifest["diffusion"]["kind"] == "edm"
    manifest["diffusion"]["kind"] = "flow"
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert run(["sample", str(copy), "--out", str(tmp_path / "run"), "--classes", "0"]) == 2
    assert "'diffusion.kind' is 'flow'" in " ".join(capsys.readouterr().err.split())
