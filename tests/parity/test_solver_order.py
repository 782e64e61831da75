"""Every solver's rows against its paper form on an exact denoiser, and the order at which it converges."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from solver_rows import walk
from torch import Tensor

from admtrt.config import DiffusionConfig, EdmConfig
from admtrt.errors import RequestError
from admtrt.models.solvers import PAPER_FORMS, trajectory
from admtrt.schedule.levels import DiscreteLevels, levels_of
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.solvers import SOLVERS
from admtrt.schedule.table import sampling_schedule

Process = DiffusionConfig | EdmConfig
SHAPE = (2, 3, 8, 8)
LINEAR, COSINE = DiffusionConfig(mean_type="x_0"), DiffusionConfig(schedule="cosine", mean_type="x_0")
EPS = DiffusionConfig()
EDM = EdmConfig(boundary=True)
GUIDED: dict[str, Any] = {"scale": 3.0}

CASES: dict[str, tuple[Process, dict[str, Any]]] = {
    "ddpm": (EPS, {"method": "ddpm", "steps": "12", **GUIDED}),
    "ddpm interval": (EPS, {"method": "ddpm", "steps": "12", "guidance_interval": (0.1, 3.0), **GUIDED}),
    "ddim": (COSINE, {"method": "ddim", "steps": "ddim10", **GUIDED}),
    "ddim eta": (EPS, {"method": "ddim", "steps": "12", "eta": 0.5, "clip": False}),
    "order 1": (EPS, {"method": "dpmpp", "order": 1, **GUIDED}),
    "2M": (EPS, {"method": "dpmpp", "grid": "logsnr", **GUIDED}),
    "2M before": (LINEAR, {"method": "dpmpp", "threshold_order": "before_guide", **GUIDED}),
    "2M dynamic": (EPS, {"method": "dpmpp", "threshold": "dynamic", **GUIDED}),
    "2M dynamic before": (
        LINEAR,
        {"method": "dpmpp", "threshold": "dynamic", "threshold_order": "before_guide", **GUIDED},
    ),
    "2M unbounded": (COSINE, {"method": "dpmpp", "clip": False, "to": "sigma_min", "final_order": "full"}),
    "2M interval": (LINEAR, {"method": "dpmpp", "guidance_interval": (0.1, 3.0), **GUIDED}),
    "2M denoise": (LINEAR, {"method": "dpmpp", "to": "sigma_min", "denoise_to_zero": True}),
    "2M edm": (EDM, {"method": "dpmpp", "scale": 0.0}),
    "3M": (COSINE, {"method": "dpmpp", "order": 3, "grid": "quadratic", **GUIDED}),
    "3M diffusers": (
        LINEAR,
        {"method": "dpmpp", "order": 3, "final_order": "diffusers", "grid": "trained"},
    ),
    "2S": (LINEAR, {"method": "dpmpp", "form": "single", **GUIDED}),
    "2S logsnr": (COSINE, {"method": "dpmpp", "form": "single", "grid": "logsnr", "steps": "9"}),
    "2S edm": (EDM, {"method": "dpmpp", "form": "single", "to": "sigma_min", "scale": 0.0}),
    "3S": (EPS, {"method": "dpmpp", "form": "single", "order": 3, **GUIDED}),
    "3S of 11": (COSINE, {"method": "dpmpp", "form": "single", "order": 3, "steps": "11"}),
    "3S of 12": (LINEAR, {"method": "dpmpp", "form": "single", "order": 3, "grid": "logsnr", "steps": "12"}),
    "3S denoise": (
        LINEAR,
        {"method": "dpmpp", "form": "single", "order": 3, "to": "sigma_min", "denoise_to_zero": True},
    ),
    "SDE": (LINEAR, {"method": "dpmpp", "sde": True, **GUIDED}),
    "SDE 1 denoise": (
        COSINE,
        {"method": "dpmpp", "sde": True, "order": 1, "to": "sigma_min", "denoise_to_zero": True},
    ),
    "SDE edm": (EDM, {"method": "dpmpp", "sde": True, "scale": 0.0}),
    "UniPC-1": (LINEAR, {"method": "unipc", "order": 1, **GUIDED}),
    "UniPC-2 bh1": (EPS, {"method": "unipc", "variant": "bh1", **GUIDED}),
    "UniPC-2 bh2": (COSINE, {"method": "unipc", "grid": "logsnr", "to": "sigma_min"}),
    "UniPC-3 bh1": (LINEAR, {"method": "unipc", "variant": "bh1", "order": 3, "final_order": "full"}),
    "UniPC-3 bh2": (EPS, {"method": "unipc", "order": 3, **GUIDED}),
    "UniPC denoise": (LINEAR, {"method": "unipc", "to": "sigma_min", "denoise_to_zero": True}),
    "UniPC edm": (EDM, {"method": "unipc", "order": 3, "scale": 0.0}),
    "UniPC respaced": (LINEAR, {"method": "unipc", "grid": "respaced"}),
    "SA-1": (LINEAR, {"method": "sa", "order": 1, "grid": "logsnr", **GUIDED}),
    "SA-2": (EPS, {"method": "sa", **GUIDED}),
    "SA-3 denoise": (
        COSINE,
        {"method": "sa", "order": 3, "final_order": "full", "to": "sigma_min", "denoise_to_zero": True},
    ),
    "SA without noise": (EPS, {"method": "sa", "order": 3, "sde": False, **GUIDED}),
    "SA edm": (EDM, {"method": "sa", "scale": 0.0}),
    "heun": (EPS, {"method": "heun", "steps": "11", **GUIDED}),
    "heun churn": (EPS, {"method": "heun", "steps": "11", "churn": (2.0, 0.0, 1e9, 1.1), **GUIDED}),
    "heun to minimum": (COSINE, {"method": "heun", "churn": (30.0, 0.1, 10.0, 1.0), "to": "sigma_min"}),
    "heun edm": (EDM, {"method": "heun", "steps": "11", "churn": (4.0, 0.0, 1e9, 1.0), "scale": 0.0}),
    "heun edm to minimum": (EDM, {"method": "heun", "to": "sigma_min", "scale": 0.0}),
    "euler": (LINEAR, {"method": "euler", "grid": "time_uniform", **GUIDED}),
    "euler rounded": (
        LINEAR,
        {"method": "euler", "sigma": "rounded", "churn": (3.0, 0.0, 1e9, 1.0), **GUIDED},
    ),
    "euler edm": (EDM, {"method": "euler", "churn": (3.0, 0.0, 1e9, 1.0), "scale": 0.0}),
    "consistency 1": (EDM, {"method": "consistency", "steps": "1", "scale": 0.0}),
    "consistency": (EDM, {"method": "consistency", "steps": "2", "scale": 0.0}),
    "consistency of 151": (
        EDM,
        {"method": "consistency", "steps": "3", "levels": (0, 50, 100, 150), "levels_of": 151, "scale": 0.0},
    ),
}
MEANS = torch.tensor([-0.6, 0.1, 0.7], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.05, 0.2, 0.1], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)


def denoised(x: Tensor, S: float) -> Tensor:
    """E[x_0 | x_0 + S n = x], for values from a mixture of three Gaussians."""
    variance = DEVIATIONS**2 + S**2
    distance = x.unsqueeze(-1) - MEANS
    chosen = (WEIGHTS.log() - 0.5 * variance.log() - 0.5 * distance**2 / variance).softmax(-1)
    return (chosen * (MEANS + DEVIATIONS**2 / variance * distance)).sum(-1)


def exact(process: Process, *, guided: bool) -> Any:
    """Networks whose prediction of x_0 is exact, in the process's parameterisation."""
    levels = levels_of(process)

    def networks(x: Tensor, t: float) -> tuple[Tensor, Tensor | None]:
        if isinstance(levels, DiscreteLevels):
            level = levels.at_timestep(t)
        else:
            level = levels.at_sigma(math.exp(t / 250))
        S = level.sigma
        wide = x / levels.c_in(level)  # x_0 + S n
        x_0 = denoised(wide, S)
        g = -0.3 * torch.tanh(x) if guided else None
        if isinstance(process, EdmConfig):
            above = S - process.sigma_min if process.boundary else S
            data = process.sigma_data
            c_skip, c_out = data**2 / (above**2 + data**2), above * data / math.hypot(S, data)
            # At the smallest level the scalings give the identity, whatever the network returns.
            return (x_0 - c_skip * wide) / max(c_out, 1e-12), g
        out = x_0 if process.mean_type == "x_0" else (wide - x_0) / S
        return (torch.cat([out, torch.tanh(x)], dim=1) if process.learns_sigma else out), g

    return networks


def tensor(seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(SHAPE))


def both(name: str, start: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """The states by the rows, and by the paper form."""
    process, choices = CASES[name]
    sampler = SamplerConfig.from_dict({"steps": "10", "scale": 0.0, **choices})
    networks = exact(process, guided=bool(sampler.scale))
    levels = levels_of(process)
    rows = SOLVERS[sampler.method].rows(levels, sampler, None)
    image = None
    if start is not None:
        rows = SOLVERS[sampler.method].rows(levels, sampler, rows.levels[len(rows) - start])
        image = tensor(99).clamp(-1, 1)
    x_T = tensor(1000)
    states = trajectory(process, sampler, networks, x_T, tensor, start=start, image=image)
    return (
        list(walk(rows, process, sampler, networks, x_T, tensor, image)),
        [state.x for state in states],
    )


def assert_equal(rows: list[Tensor], paper: list[Tensor]) -> None:
    assert len(rows) == len(paper)
    for place, (ours, theirs) in enumerate(zip(rows, paper, strict=True)):
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        assert error <= 1e-11, (place, error)


@pytest.mark.parametrize("name", CASES)
def test_rows_equal_the_paper_form(name: str) -> None:
    assert_equal(*both(name))


def test_every_solver_has_a_paper_form_and_a_case() -> None:
    assert PAPER_FORMS.keys() == SOLVERS.keys()
    assert {choices["method"] for _, choices in CASES.values()} == SOLVERS.keys()


STARTS = [name for name, (_, choices) in CASES.items() if choices["method"] != "consistency"]
ENDING = {"2S edm", "heun to minimum", "heun edm to minimum"}
"""Their last evaluation is where the last step ends, or inside of it."""


@pytest.mark.parametrize("name", STARTS)
def test_starts_at_an_image_equal_the_paper_form(name: str) -> None:
    for start in (4, 7):
        assert_equal(*both(name, start))
    if name not in ENDING:
        assert_equal(*both(name, 1))
        return
    process, choices = CASES[name]
    with pytest.raises(RequestError, match=r"no step of .* is left from the noise level"):
        sampling_schedule(process, SamplerConfig.from_dict({"steps": "10", "scale": 0.0, **choices}), start=1)


def test_consistency_models_start_at_an_image() -> None:
    for start in (1, 2, 3):
        assert_equal(*both("consistency of 151", start))


@pytest.mark.parametrize("name", [name for name, (_, choices) in CASES.items() if "churn" in choices])
def test_churn_of_the_first_step_is_in_the_first_state(name: str) -> None:
    """x_T at the first level, and the noise that raises it, in the scale of the raised level."""
    process, choices = CASES[name]
    sampler = SamplerConfig.from_dict({"steps": "10", "scale": 0.0, **choices})
    levels, schedule = levels_of(process), sampling_schedule(process, sampler)
    S = sampling_schedule(process, sampler.model_copy(update={"churn": None})).sigma[0]
    amount, low, high, factor = choices["churn"]
    steps = (int(sampler.steps) + 1) // 2 if sampler.method == "heun" else int(sampler.steps)
    raised = levels.at_sigma(S * (1 + min(amount / steps, math.sqrt(2) - 1))) if low <= S <= high else None
    if raised is None:
        assert schedule.init_noise == 0
        return
    if sampler.sigma == "rounded":
        raised = levels.rounded(raised)
    scale = levels.c_in(raised)
    assert schedule.sigma[0] == pytest.approx(raised.sigma, rel=1e-12)
    assert schedule.init_scale == pytest.approx(scale * S, rel=1e-12)
    expected = scale * factor * math.sqrt(raised.sigma**2 - S**2)
    assert schedule.init_noise == pytest.approx(expected, rel=1e-9)
    assert expected > 0


FULL = {"final_order": "full"}
ORDERS: dict[str, tuple[dict[str, Any], float]] = {
    "DDIM": ({"method": "dpmpp", "order": 1}, 1.0),
    "2M": ({"method": "dpmpp", **FULL}, 2.0),
    "2S": ({"method": "dpmpp", "form": "single"}, 2.0),
    "Heun": ({"method": "heun"}, 2.0),
    "3M": ({"method": "dpmpp", "order": 3, **FULL}, 2.0),
    "3S": ({"method": "dpmpp", "form": "single", "order": 3}, 2.0),
    "SA-2": ({"method": "sa", "sde": False, **FULL}, 3.0),
    "UniPC-2": ({"method": "unipc", **FULL}, 3.0),
    "UniPC-3": ({"method": "unipc", "order": 3, **FULL}, 3.2),
}
"""The published 3M converges at order 2, and so does 3S because of its last step."""


@cache
def image_of(name: str, evaluations: int) -> Tensor:
    choices = {"grid": "logsnr", "to": "sigma_min", "scale": 0.0, "clip": False, "steps": str(evaluations)}
    sampler = SamplerConfig.from_dict(choices | ORDERS[name][0])
    rows = SOLVERS[sampler.method].rows(levels_of(LINEAR), sampler, None)
    (*_, end) = walk(rows, LINEAR, sampler, exact(LINEAR, guided=False), tensor(5)[:1, :1], tensor)
    return end


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name: str) -> None:
    true = image_of("UniPC-3", 1680)
    errors = [float((image_of(name, count) - true).abs().mean()) for count in (84, 168, 336)]
    measured = [math.log2(before / after) for before, after in pairwise(errors)]
    expected = ORDERS[name][1]
    if name == "3S":  # of 84 evaluations its steps of order 3 still show beside the one of order 1 at the end
        del measured[0]
    if name == "UniPC-3":  # at least
        assert min(measured) >= expected, errors
    else:
        assert measured == pytest.approx([expected] * len(measured), abs=0.1), errors
