"""Likelihood by the probability-flow ODE: closed forms of Gaussians by exported graphs; the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from bundles import UNET, network
from onnx_graphs import session
from torch import Tensor, nn

from admtrt.bundle import Bundle, Manifest
from admtrt.cli import run
from admtrt.config import DiffusionConfig, UNetConfig
from admtrt.data.image_set import ImageSet
from admtrt.errors import AdmtrtError, ConfigError, RequestError
from admtrt.export.gradient import export_vector_jacobian
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.run_config import DataConfig
from admtrt.runtime.backends.opening import open_denoiser
from admtrt.schedule.levels import levels_of
from admtrt.verify.nll_ode import BIN, evaluate_flow, uniform
from admtrt.verify.ode import integrate
from admtrt.verify.stages import verify_bundle

RNG = np.random.default_rng(5)
COUNT = 4
PIXELS = RNG.integers(60, 200, (COUNT, 8, 8, 1), dtype=np.uint8)
DATA = ImageSet(DataConfig(source="drawn", image_size=8, channels=1), PIXELS)
MEAN = RNG.uniform(-0.3, 0.3, 64)
DEVIATION = RNG.uniform(0.3, 0.6, 64)
ROTATION = np.linalg.qr(np.eye(64) + 0.05 * RNG.standard_normal((64, 64)))[0]


class ExactNoise(nn.Module):
    """The eps of a process whose data are N(MEAN, rotation diag(DEVIATION^2) rotation'), for any t."""

    def __init__(self, process: DiffusionConfig, rotation: np.ndarray, channels: int) -> None:
        super().__init__()
        steps = [levels_of(process).at_timestep(t) for t in range(process.steps)]  # type: ignore[attr-defined]
        self.log_alpha = torch.tensor([-0.5 * np.logaddexp(0, -2 * level.lam) for level in steps])
        self.mean, self.variance = torch.tensor(MEAN), torch.tensor(DEVIATION**2)
        self.rotation, self.channels = torch.tensor(rotation), channels

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        whole = t.double().floor().clamp(0, len(self.log_alpha) - 2)
        index, part = whole.long(), t.double() - whole
        log_alpha = self.log_alpha[index] * (1 - part) + self.log_alpha[index + 1] * part
        alpha = log_alpha.exp()[:, None]
        sigma = (1 - alpha**2).sqrt()
        rotated = (x.double().flatten(1) - alpha * self.mean) @ self.rotation
        eps = sigma * rotated / (alpha**2 * self.variance + sigma**2) @ self.rotation.T
        return eps.reshape(-1, 1, 8, 8).float().repeat(1, self.channels, 1, 1)


class Exported:
    """A graph of the contract's inputs and outputs in a denoiser's place."""

    def __init__(self, module: nn.Module, path: Path) -> None:
        example = {"x": torch.zeros(2, 1, 8, 8), "t": torch.full((2,), 7.3)}
        export_vector_jacobian(module.eval(), example, path)
        self.session = session(onnx.load(path))

    def run(self, graph: str, feeds: Any) -> Any:
        assert graph == "unet_vector_jacobian"
        return dict(zip(("grad", "out"), self.session.run(["grad", "out"], dict(feeds)), strict=True))


def closed_form(process: DiffusionConfig, rotation: np.ndarray, seeds: range) -> float:
    """Bits per dim of x_0 + S eps at the smallest S, of the images with their noise."""
    images = PIXELS.reshape(COUNT, 64) / 127.5 - 1
    x = images + (uniform(list(seeds), (64,)) - 0.5) * BIN
    variance = DEVIATION**2 + levels_of(process).cleanest.sigma ** 2
    squares = ((x - MEAN) @ rotation) ** 2 / variance
    density = -0.5 * (squares + np.log(2 * math.pi * variance)).sum(1)
    return float((-density / 64 / math.log(2) - math.log2(BIN)).mean())


def closed_form_of_the_flow(process: DiffusionConfig, seeds: range) -> float:
    """The same for a standard normal x_T, as for samples: with independent pixels the flow is affine."""
    images = PIXELS.reshape(COUNT, 64) / 127.5 - 1
    x = images + (uniform(list(seeds), (64,)) - 0.5) * BIN
    levels = levels_of(process)
    last = levels.at_timestep(process.steps - 1)  # type: ignore[attr-defined]
    stretch = np.sqrt((DEVIATION**2 + last.sigma**2) / (DEVIATION**2 + levels.cleanest.sigma**2))
    state = levels.c_in(last) * (MEAN + (x - MEAN) * stretch)
    density = -0.5 * (state**2 + math.log(2 * math.pi)) + np.log(stretch * levels.c_in(last))
    return float((-density.mean(1) / math.log(2) - math.log2(BIN)).mean())


@pytest.mark.parametrize(("schedule", "learn_sigma"), [("linear", False), ("cosine", True)])
def test_a_gaussian_has_its_closed_form(schedule: Any, learn_sigma: bool, tmp_path: Path) -> None:
    """With independent pixels Hutchinson's estimate is exact: only errors of solver and float32 remain."""
    process = DiffusionConfig(schedule=schedule)
    config = UNET.model_copy(update={"learn_sigma": learn_sigma})
    denoiser = Exported(ExactNoise(process, np.eye(64), config.out_channels), tmp_path / "g.onnx")
    found = evaluate_flow(denoiser, config, process, DATA, seed=3)  # type: ignore[arg-type]
    expected = closed_form(process, np.eye(64), range(3, 3 + COUNT))
    assert found.bits_per_dim == pytest.approx(expected, abs=1e-3)
    assert abs(found.bits_per_dim - closed_form_of_the_flow(process, range(3, 3 + COUNT))) < 5e-5
    assert 0 < found.solver_error < 5e-5
    assert found.images == COUNT
    assert 20 < found.evaluations < 500


def test_correlated_pixels_and_the_batch(tmp_path: Path) -> None:
    """Then the estimate has noise, which the seed decides and the batch size does not."""
    process = DiffusionConfig()
    denoiser = Exported(ExactNoise(process, ROTATION, 1), tmp_path / "g.onnx")
    config = UNET.model_copy(update={"learn_sigma": False})
    differences = []
    for seed in range(0, 60, COUNT):
        found = evaluate_flow(denoiser, config, process, DATA, seed=seed, tolerance=1e-4)  # type: ignore[arg-type]
        differences.append(found.bits_per_dim - closed_form(process, ROTATION, range(seed, seed + COUNT)))
    error = np.std(differences, ddof=1) / math.sqrt(len(differences))
    assert abs(np.mean(differences)) < 4 * error
    assert error < 5e-3
    again = evaluate_flow(
        denoiser,
        config,
        process,
        DATA,
        seed=seed,
        tolerance=1e-4,
        batch_size=3,  # type: ignore[arg-type]
    )
    assert again.bits_per_dim == pytest.approx(found.bits_per_dim, abs=1e-5)
    assert again.evaluations == found.evaluations


def test_the_solver_keeps_its_promise() -> None:
    """y' = a y and a ripple: the estimated error bounds the real one, and falls with the tolerance."""
    rates = np.array([[-1.0], [0.5], [-8.0]])

    def derivative(s: np.ndarray, y: np.ndarray) -> np.ndarray:
        return rates * y + np.cos(3 * s)[:, None]

    def exact(s: float) -> np.ndarray:
        denominator = rates**2 + 9
        part = (3 * np.sin(3 * s) - rates * np.cos(3 * s)) / denominator
        return (1 + rates / denominator) * np.exp(rates * s) + part

    evaluations = []
    for tolerance in (1e-4, 1e-8):
        found = integrate(derivative, np.ones((3, 1)), 0.0, 2.0, lambda s, t=tolerance: np.full((3, 1), t))
        assert (np.abs(found.y - exact(2.0)) <= 3 * found.error).all()
        assert (found.error < 100 * tolerance).all()
        evaluations.append(found.evaluations)
        alone = integrate(
            lambda s, y: rates[2:] * y + np.cos(3 * s)[:, None], np.ones((1, 1)), 0.0, 2.0,
            lambda s, t=tolerance: np.full((1, 1), t),
        )  # fmt: skip
        np.testing.assert_allclose(alone.y[0], found.y[2], rtol=1e-12)
        assert alone.evaluations[0] == found.evaluations[2]
    assert (evaluations[0] < evaluations[1]).all()


@pytest.mark.parametrize(
    ("derivative", "message"),
    [(lambda s, y: y * np.nan, "not finite"), (lambda s, y: RNG.standard_normal(y.shape), "too small")],
)
def test_what_has_no_solution_is_told(derivative: Any, message: str) -> None:
    with pytest.raises(AdmtrtError, match=message):
        integrate(derivative, np.ones((2, 2)), 0.0, 1.0, lambda s: np.full((2, 1), 1e-9))


# --- the command ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An upsampler with classes: it takes every input that a UNet can have."""
    path = tmp_path_factory.mktemp("ode") / "bundle"
    config = UNetConfig.from_dict(UNET.to_dict() | {"num_classes": 4, "low_res_size": 4})
    bundle_from_checkpoints(network(config), None, path, likelihood=True)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, arr_0=PIXELS, arr_1=np.arange(COUNT) % 4)
    return path


def test_the_command(bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--bundle", bundle, "--data", data, "--method", "ode", "--tolerance", 1e-2, "--images", 3]
    code = run(["evaluate", "nll", "--json", *map(str, options)])
    shown, complaint = capsys.readouterr()
    assert code == 0, complaint
    found = json.loads(shown)
    assert found["method"] == "ode"
    assert found["images"] == 3
    assert found["tolerance"] == 1e-2
    assert math.isfinite(found["bits_per_dim"])
    assert found["evaluations"] > 7
    assert found["solver_error"] > 0
    assert run(["evaluate", "nll", *map(str, options)]) == 0
    assert "error of the solver" in capsys.readouterr().out


def test_sampling_leaves_the_further_graph_alone(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert "unet_vector_jacobian" in opened.manifest.graphs
    assert set(open_denoiser(opened).specs) == set(opened.manifest.graphs) - {"unet_vector_jacobian"}
    changed = opened.manifest.to_dict()
    changed["graphs"]["unet_vector_jacobian"]["spec"]["inputs"].pop()
    with pytest.raises(ConfigError, match="'unet_vector_jacobian' declares other inputs"):
        Manifest.from_dict(changed)


def test_verify_compares_the_further_graph(bundle: Path) -> None:
    config = UNetConfig.from_dict(UNET.to_dict() | {"num_classes": 4, "low_res_size": 4})
    report = verify_bundle(Bundle.open(bundle), network(config), None, steps=2)
    rows = {row.what: row for row in report.rows if "unet_vector_jacobian" in row.what}
    assert set(rows) == {"unet_vector_jacobian: grad", "unet_vector_jacobian: out"}
    assert all(row.status == "pass" for row in rows.values())


def test_what_the_command_refuses(
    bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle_from_checkpoints(network(UNET), None, tmp_path / "plain")
    for options, words in (
        (["--bundle", tmp_path / "plain"], "--likelihood"),
        (["--unet", "u.safetensors"], "admtrt export CHECKPOINT --likelihood"),
        (["--bundle", bundle, "--steps", "10"], "--steps is of the bound"),
        (["--bundle", bundle, "--tolerance", "2"], "tolerance is 2; expected"),
        (["--bundle", bundle, "--backend", "auto"], "named backend"),
        (["--bundle", bundle, "--backend", "openvino", "--precision", "bf16"], "--precision fp32"),
        (["--bundle", bundle, "--method", "sde"], "'sde' is unknown"),
        (["--bundle", bundle, "--method", "bound", "--tolerance", "1e-4"], "--tolerance is of the solver"),
    ):
        method = [] if "--method" in options else ["--method", "ode"]
        assert run(["evaluate", "nll", "--data", str(data), *method, *map(str, options)]) == 2, options
        assert words in " ".join(capsys.readouterr().err.split())


def test_a_network_of_another_kind_is_refused() -> None:
    process = DiffusionConfig(mean_type="previous_x")
    with pytest.raises(RequestError, match="previous_x"):
        evaluate_flow(None, UNET.model_copy(update={"learn_sigma": False}), process, DATA)  # type: ignore[arg-type]
