"""The update graph against the process as the papers write it."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from goldens import relative_error
from onnx_graphs import op_types, proto, run, session
from schedules import step_coefficients

from admtrt.config import DiffusionConfig, UNetConfig
from admtrt.contract import update_spec
from admtrt.export.check import check_graph
from admtrt.export.graphs import EXAMPLE_BATCH
from admtrt.export.small_graphs import update_graph
from admtrt.export.write import write_graph
from admtrt.models.diffusion import Diffusion
from admtrt.models.solvers import sample_step
from admtrt.schedule.process import process_from_config
from admtrt.schedule.sampler import SamplerConfig

# Both sides round the same float64 tables to float32 once; x_{t-1} is a sum of five terms.
TOLERANCE = 1e-5
STEPS = "20"
SAMPLERS = {
    "ddpm": {"method": "ddpm"},
    "ddim": {"method": "ddim"},
    "ddim eta 0.5": {"method": "ddim", "eta": 0.5},
    "ddim eta 1": {"method": "ddim", "eta": 1.0},
}
MEANS = ("eps", "x_0", "previous_x")
VARIANCES = ("learned_range", "learned", "fixed_small", "fixed_large")


def unet(*, learn_sigma: bool, channels: int = 3) -> UNetConfig:
    return UNetConfig(
        image_size=4,
        in_channels=channels,
        model_channels=32,
        channel_mult=(1,),
        attention_resolutions=(),
        learn_sigma=learn_sigma,
    )


@cache
def graph(learn_sigma: bool) -> ort.InferenceSession:
    return session(proto(update_graph(unet(learn_sigma=learn_sigma))))


def tensors(count: int, *, learn_sigma: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (count, 3, 4, 4)
    out = torch.randn(count, 6 if learn_sigma else 3, 4, 4, generator=generator)
    return {"x": torch.randn(shape, generator=generator), "out": out} | {
        name: torch.randn(shape, generator=generator) for name in ("grad", "noise")
    }


def reference(
    config: DiffusionConfig, sampler: SamplerConfig, step: int, row: dict[str, torch.Tensor]
) -> Any:
    diffusion = Diffusion(config, process_from_config(config, sampler.steps))
    return sample_step(
        diffusion, row["out"], row["x"], torch.tensor([step]), row["noise"], row["grad"], sampler
    )


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "free"])
@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("mean_type", MEANS)
def test_equals_the_papers(mean_type: Any, variance_type: Any, kind: str, clip: bool) -> None:
    config = DiffusionConfig(mean_type=mean_type, variance_type=variance_type)
    sampler = SamplerConfig(steps=STEPS, scale=2.5, clip=clip, **SAMPLERS[kind])
    coefficients = step_coefficients(config, sampler)
    steps = [0, 1, 10, 19]
    feeds = tensors(len(steps), learn_sigma=config.learns_sigma)
    out = run(graph(config.learns_sigma), **feeds, coefficients=coefficients[steps])
    for index, step in enumerate(steps):
        row = {name: tensor[index : index + 1] for name, tensor in feeds.items()}
        x_prev, x_0 = reference(config, sampler, step, row)
        assert relative_error(out["x_prev"][index : index + 1], x_prev) <= TOLERANCE, step
        assert relative_error(out["pred_x0"][index : index + 1], x_0) <= TOLERANCE, step


def test_samples_of_different_samplers_share_a_batch() -> None:
    """Method, step, scale, eta, clipping and schedule are a matter of each row's coefficients."""
    config = DiffusionConfig()
    rows = [
        (SamplerConfig(steps="20", scale=1.0), 19),
        (SamplerConfig(steps="ddim25", method="ddim", scale=4.0, eta=0.5), 7),
        (SamplerConfig(steps="250", scale=0.0, clip=False), 100),
        (SamplerConfig(steps="10", method="ddim", scale=0.0), 0),
        (SamplerConfig(steps="20", scale=-2.0), 0),
    ]
    feeds = tensors(len(rows), learn_sigma=True)
    coefficients = np.stack([step_coefficients(config, s)[step] for s, step in rows])
    out = run(graph(True), **feeds, coefficients=coefficients)
    for index, (sampler, step) in enumerate(rows):
        row = {name: tensor[index : index + 1] for name, tensor in feeds.items()}
        x_prev, x_0 = reference(config, sampler, step, row)
        assert relative_error(out["x_prev"][index : index + 1], x_prev) <= TOLERANCE
        assert relative_error(out["pred_x0"][index : index + 1], x_0) <= TOLERANCE
        alone = run(graph(True), **row, coefficients=coefficients[index : index + 1])
        np.testing.assert_array_equal(alone["x_prev"], out["x_prev"][index : index + 1])


@pytest.mark.parametrize("column", range(11))
def test_every_coefficient_changes_the_step(column: int) -> None:
    """No input of the graph is idle: a wrong column would be seen."""
    feeds = tensors(1, learn_sigma=True)
    base = np.float32([[0.8, -0.6, 1.0, 0.3, 0.5, 0.4, 0.2, -1.0, 0.5, 0.7, 0.9]])
    changed = base.copy()
    changed[0, column] *= 1.1
    before, after = (run(graph(True), **feeds, coefficients=rows) for rows in (base, changed))
    assert any(np.abs(before[name] - after[name]).max() > 1e-3 for name in before)


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_contract(learn_sigma: bool, channels: int, tmp_path: Any) -> None:
    config = unet(learn_sigma=learn_sigma, channels=channels)
    model = update_graph(config)
    write_graph(model, tmp_path / "update.onnx")
    check_graph(tmp_path / "update.onnx", update_spec(config), example_batch=EXAMPLE_BATCH)
    assert len(op_types(proto(model))) < 40
