"""Training objectives: inputs, losses and weights; and the update that draws sample grids."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from schedules import step_coefficients
from torch.nn import functional as F

from admtrt.config import DiffusionConfig
from admtrt.models.denoiser import TorchDenoiser
from admtrt.models.diffusion import Diffusion
from admtrt.models.solvers import sample_step
from admtrt.schedule.process import process_from_config
from admtrt.schedule.sampler import SamplerConfig
from admtrt.training.losses import snr_weights
from admtrt.training.objectives import ClassifierObjective, DenoisingObjective, shrink


def test_the_denoising_objective_is_conditioned_as_configured():
    diffusion = Diffusion(
        DiffusionConfig(steps=8, schedule="cosine"),
        process_from_config(DiffusionConfig(steps=8, schedule="cosine")),
    )
    x_0 = torch.rand(2, 1, 8, 8)
    seen = {}

    def network(x, t, y, low_res):
        seen.update(y=y, low_res=low_res)
        return torch.zeros(2, 2, 8, 8)

    y, step = torch.tensor([1, 2]), torch.tensor([0, 5])
    DenoisingObjective(diffusion, "hybrid", class_conditional=False, low_res_size=None)(
        network, x_0, y, step, torch.zeros_like(x_0)
    )
    assert seen == {"y": None, "low_res": None}
    DenoisingObjective(diffusion, "hybrid", class_conditional=True, low_res_size=4)(
        network, x_0, y, step, torch.zeros_like(x_0)
    )
    assert seen["y"] is y
    torch.testing.assert_close(seen["low_res"], F.avg_pool2d(x_0, 2))


@pytest.mark.parametrize("mean_type", ["eps", "x_0"])
def test_snr_weights_are_those_of_the_papers(mean_type):
    """By hand, for alpha_bar of 0.5 (SNR 1) and 0.9 (SNR 9), where min-SNR cuts at 5."""
    process = SimpleNamespace(alpha_bar=np.array([0.9, 0.5]))
    min_snr, p2 = (snr_weights(name, process, mean_type).tolist() for name in ("min-snr", "p2"))
    if mean_type == "eps":
        assert (min_snr, p2) == (pytest.approx([5 / 9, 1]), pytest.approx([0.1, 0.5]))
    else:
        assert (min_snr, p2) == (pytest.approx([5, 1]), pytest.approx([0.9, 0.5]))


def test_snr_weights_change_the_total_and_no_part():
    config = DiffusionConfig(steps=8, schedule="cosine")
    diffusion = Diffusion(config, process_from_config(config))
    x_0, noise, step = torch.rand(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([0, 4, 7])
    plain, weighted = (
        DenoisingObjective(
            diffusion, "hybrid", class_conditional=False, low_res_size=None, snr_weighting=name
        )(lambda x, *_: torch.cat([x, x], dim=1), x_0, None, step, noise)
        for name in ("none", "min-snr")
    )
    weights = torch.from_numpy(snr_weights("min-snr", diffusion.process, "eps"))[step].float()
    assert torch.equal(plain["mse"], weighted["mse"])
    torch.testing.assert_close(weighted["loss"], weights * plain["mse"] + plain["vb"])


def test_the_classifier_sees_noisy_images():
    config = DiffusionConfig(steps=8, schedule="cosine")
    diffusion = Diffusion(config, process_from_config(config))
    x_0, noise, step = torch.rand(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([0, 4, 7])
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])

    def network(x, t):
        torch.testing.assert_close(x, diffusion.q_sample(x_0, step, noise))
        assert t.tolist() == [0, 4, 7]
        return logits

    values = ClassifierObjective(diffusion)(network, x_0, torch.tensor([0, 1, 1]), step, noise)
    assert values["accuracy"].tolist() == [1, 1, 0]
    torch.testing.assert_close(values["loss"], torch.log1p(torch.tensor([-2.0, -1.0, 3.0]).exp()))


def test_shrink_averages():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert shrink(x, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize("variance", ["learned_range", "learned", "fixed_small", "fixed_large"])
@pytest.mark.parametrize("mean", ["eps", "x_0", "previous_x"])
@pytest.mark.parametrize(
    "sampler", [{"method": "ddpm"}, {"method": "ddim"}, {"method": "ddim", "eta": 0.7}], ids=str
)
def test_the_torch_denoiser_steps_as_the_papers_say(variance, mean, sampler):
    config = DiffusionConfig(steps=40, mean_type=mean, variance_type=variance)
    settings = SamplerConfig(**sampler, steps="", scale=2.0)
    process = process_from_config(config)
    rng = torch.Generator().manual_seed(0)
    step = torch.tensor([0, 1, 20, 39])
    x, value, v, noise, grad = (torch.randn(4, 1, 4, 4, generator=rng) for _ in range(5))
    out = torch.cat([value, v.tanh()], dim=1) if config.learns_sigma else value
    expected = sample_step(Diffusion(config, process), out, x, step, noise, grad, settings)
    coefficients = step_coefficients(config, settings)[step.numpy()]
    denoiser = TorchDenoiser(torch.nn.Identity())
    given = {"x": x, "out": out, "grad": grad, "noise": noise}
    feeds = {name: tensor.numpy() for name, tensor in given.items()}
    found = denoiser.run("update", feeds | {"coefficients": coefficients})
    for ours, theirs in zip((found["x_prev"], found["pred_x0"]), expected, strict=True):
        for sample, reference in zip(torch.from_numpy(ours), theirs, strict=True):
            # fp32, and the reference divides by sqrt(alpha_bar) where ours has one rounded coefficient.
            assert (sample - reference).abs().max() <= 1e-4 * reference.abs().max()
