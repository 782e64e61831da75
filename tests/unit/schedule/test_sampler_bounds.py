"""Choices that came with diffusers' folders: the bound of x_0, the threshold's, and DDIM's direction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from admtrt.config import DiffusionConfig
from admtrt.errors import ConfigError, RequestError
from admtrt.schedule.sampler import SamplerConfig, with_choices
from admtrt.schedule.table import UPDATE_FULL, sampling_schedule

PROCESS = DiffusionConfig(variance_type="fixed_small")
ZERO = DiffusionConfig.from_dict(
    {"variance_type": "fixed_small", "mean_type": "v", "zero_terminal_snr": True}
)


def column(name: str, process: DiffusionConfig = PROCESS, **choices: Any) -> np.ndarray:
    sampler = SamplerConfig.from_dict({"steps": "10", "scale": 0.0} | choices)
    found: np.ndarray = sampling_schedule(process, sampler).coefficients[:, UPDATE_FULL.index(name)]
    return found


BOUNDS = [(True, True, 1.0), (False, False, None), (1, True, 1.0), (1.0, True, 1.0), (0, False, None)]
NUMBERS = [(0.5, 0.5, 0.5), (2, 2.0, 2.0), ("false", False, None), ("0.5", 0.5, 0.5)]


@pytest.mark.parametrize(("given", "stored", "bound"), [*BOUNDS, *NUMBERS])
def test_the_bound_of_x_0(given: Any, stored: Any, bound: float | None) -> None:
    sampler = SamplerConfig.from_dict({"clip": given})
    assert sampler.clip == stored
    assert isinstance(sampler.clip, type(stored))
    assert sampler.bound == bound
    assert SamplerConfig.from_dict(sampler.to_dict()) == sampler


@pytest.mark.parametrize("given", [-1, -0.5, "often", None, [1.0]])
def test_what_is_no_bound(given: Any) -> None:
    with pytest.raises(ConfigError, match="clip"):
        SamplerConfig.from_dict({"clip": given})


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpmpp", "heun"])
def test_bounds_stand_in_the_table(method: str) -> None:
    steps = {"steps": "11"}
    assert (column("clip", method=method, clip=0.5, **steps) == np.float32(0.5)).all()
    assert (column("bound", method=method, clip=0.5, **steps) == np.float32(0.5)).all()
    dynamic = {"threshold": "dynamic", "clip": 0.5, **steps}
    assert (column("bound", method=method, **dynamic) == np.finfo(np.float32).max).all()
    assert (column("bound", method=method, threshold_max=1.5, **dynamic) == np.float32(1.5)).all()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"threshold_max": 1.5}, "threshold is 'static'"),
        ({"threshold": "dynamic", "threshold_max": 0.5}, "threshold_max 0.5 is below the bound 1"),
        ({"threshold": "dynamic", "clip": False}, "clip is False"),
        ({"direction": "network"}, "direction belongs to ddim; ddpm has no such choice"),
        ({"method": "consistency", "threshold_max": 2.0}, "threshold_max belongs to"),
    ],
)
def test_choices_that_do_not_fit(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplerConfig.from_dict(choices)


def test_choices_replace_a_recommended_threshold() -> None:
    recommended = SamplerConfig(threshold="dynamic", threshold_max=1.5, steps="20")
    assert with_choices(recommended, PROCESS, {"clip": False}).threshold is None
    static = with_choices(recommended, PROCESS, {"threshold": "static"})
    assert (static.threshold, static.threshold_max) == ("static", None)
    assert with_choices(recommended, PROCESS, {"steps": "10"}).threshold_max == 1.5
    assert with_choices(recommended, PROCESS, {"method": "ddim"}).threshold is None


@pytest.mark.parametrize("mean", ["eps", "x_0", "v", "previous_x"])
def test_directions_agree_where_nothing_is_bounded(mean: str) -> None:
    process = DiffusionConfig.from_dict({"variance_type": "fixed_small", "mean_type": mean})
    own = {"method": "ddim", "eta": 0.3, "clip": False}
    rng = np.random.default_rng(0)
    x, out = rng.standard_normal((2, 10))

    def step(direction: str) -> np.ndarray:
        c = {
            name: column(name, process, direction=direction, **own).astype(np.float64)
            for name in ("x0_from_x", "x0_from_out", "prev_from_x0", "prev_from_x", "prev_from_out")
        }
        x_0 = c["x0_from_x"] * x + c["x0_from_out"] * out
        made: np.ndarray = c["prev_from_x0"] * x_0 + c["prev_from_x"] * x + c["prev_from_out"] * out
        return made

    np.testing.assert_allclose(step("network"), step("clipped"), rtol=2e-5, atol=2e-5)
    bounded = column("prev_from_x0", process, direction="network", **own)
    assert np.abs(bounded - column("prev_from_x0", process, **own)).max() > 0.01


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_without_signal_nothing_is_guided(method: str, scale: float) -> None:
    sampler = SamplerConfig.from_dict({"method": method, "steps": "trailing:5", "scale": scale})
    schedule = sampling_schedule(ZERO, sampler)
    assert np.isinf(schedule.sigma[0])
    assert np.isfinite(schedule.coefficients).all()
    assert not schedule.guided[0]
    assert schedule.guided[1:].any() == bool(scale)


@pytest.mark.parametrize("method", ["dpmpp", "unipc", "heun"])
def test_fast_solvers_of_a_process_without_last_signal(method: str) -> None:
    for choices in ({}, {"grid": "karras"}, {"grid": "logsnr"}, {"grid": "trained"}):
        sampler = SamplerConfig.from_dict({"method": method, "steps": "9", "scale": 0.0} | choices)
        schedule = sampling_schedule(ZERO, sampler)
        assert np.isfinite(schedule.coefficients).all()
        assert np.isfinite(schedule.sigma).all()
    respaced = {"method": method, "steps": "5", "grid": "respaced", "scale": 0.0}
    with pytest.raises(RequestError, match="begins where no signal is left"):
        sampling_schedule(ZERO, SamplerConfig.from_dict(respaced))


def test_a_start_at_pure_noise() -> None:
    sampler = SamplerConfig(method="ddim", steps="trailing:5", scale=0.0)
    schedule = sampling_schedule(ZERO, sampler, 5)
    assert (schedule.init_signal, schedule.init_scale) == (0.0, 1.0)
    assert np.isfinite(schedule.coefficients).all()
