"""The schedule against float64 closed forms, and respacing by its properties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from schedules import step_coefficients

from admtrt.config import DiffusionConfig, NoiseConfig
from admtrt.schedule.parameterisation import log_variance_bounds
from admtrt.schedule.process import betas, process_from_config, retained_timesteps
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import UPDATE, sampling_schedule

EXACT = 1e-12  # relative; float64 holds 1e-16 and alpha_bar is a product of at most 4000 factors
STORED = 2e-7  # relative; coefficients are rounded to float32 once, which moves them by at most 6e-8
METHODS = [
    SamplerConfig(method="ddpm", scale=3.0),
    SamplerConfig(method="ddim", scale=3.0),
    SamplerConfig(method="ddim", scale=3.0, eta=0.7),
]


def column(config: DiffusionConfig, respacing: str, name: str, **sampler: Any) -> np.ndarray:
    rows = step_coefficients(config, SamplerConfig(**{"steps": respacing} | sampler))
    return rows[:, UPDATE.index(name)].astype(np.float64)


# --- betas and tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [21, 100, 1000, 4000])
def test_linear_betas_are_equally_spaced_between_scaled_ends(steps: int) -> None:
    beta = betas(NoiseConfig(steps=steps))
    assert beta.dtype == np.float64
    assert len(beta) == steps
    assert beta[0] == pytest.approx(0.1 / steps, rel=EXACT)
    assert beta[-1] == pytest.approx(20 / steps, rel=EXACT)
    np.testing.assert_allclose(np.diff(beta), (beta[-1] - beta[0]) / (steps - 1), rtol=1e-9)


@pytest.mark.parametrize("steps", [2, 50, 4000])
def test_cosine_betas_multiply_to_the_squared_cosine(steps: int) -> None:
    beta = betas(NoiseConfig(schedule="cosine", steps=steps))
    position = (np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2
    expected = np.cos(position) ** 2 / np.cos(position[0]) ** 2
    # The last beta is cut to 0.999, all products before it are the function itself.
    np.testing.assert_allclose(np.cumprod(1 - beta)[:-1], expected[1:-1], rtol=1e-9)
    assert beta[-1] == 0.999
    assert (beta > 0).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("respacing", ["", "250", "ddim25", "90,60,60,20,20", "2"])
def test_a_respaced_process_has_the_alpha_bar_of_the_base(schedule: Any, respacing: str) -> None:
    config = DiffusionConfig(schedule=schedule)
    process = process_from_config(config, respacing)
    base = np.cumprod(1 - betas(NoiseConfig.from_dict({"schedule": schedule})))
    assert process.timesteps.tolist() == list(retained_timesteps(1000, respacing))
    np.testing.assert_allclose(process.alpha_bar, base[process.timesteps], rtol=EXACT)
    # A beta near 1 is rounded by 1e-16, whatever is left of 1 - beta.
    np.testing.assert_allclose(np.cumprod(1 - process.beta), process.alpha_bar, rtol=EXACT, atol=2e-16)
    np.testing.assert_array_equal(process.alpha_bar_prev, [1, *process.alpha_bar[:-1]])
    assert ((process.beta > 0) & (process.beta < 1)).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("respacing", ["", "50", "ddim25"])
def test_the_posterior_is_the_product_of_two_gaussians(schedule: Any, respacing: str) -> None:
    """q(x_{t-1} | x_t, x_0) by completing the square: precisions add, and so do precision-weighted means."""
    process = process_from_config(DiffusionConfig(schedule=schedule), respacing)
    alpha, prev = 1 - process.beta[1:], process.alpha_bar_prev[1:]
    prior_precision, likelihood_precision = 1 / (1 - prev), alpha / process.beta[1:]
    variance = 1 / (prior_precision + likelihood_precision)
    np.testing.assert_allclose(process.posterior_variance[1:], variance, rtol=1e-9)
    np.testing.assert_allclose(
        process.posterior_mean_x0[1:], variance * prior_precision * np.sqrt(prev), rtol=1e-9
    )
    np.testing.assert_allclose(
        process.posterior_mean_xt[1:], variance * likelihood_precision / np.sqrt(alpha), rtol=1e-9
    )
    # At the first step x_{t-1} is x_0: no variance, and no weight of x_t.
    first = [process.posterior_variance[0], process.posterior_mean_x0[0], process.posterior_mean_xt[0]]
    assert first == pytest.approx([0, 1, 0], abs=1e-12)


@pytest.mark.parametrize("respacing", ["", "ddim25"])
def test_variance_bounds(respacing: str) -> None:
    process = process_from_config(DiffusionConfig(), respacing)
    lower, upper, fixed_large = log_variance_bounds(process)
    np.testing.assert_array_equal(lower[1:], np.log(process.posterior_variance[1:]))
    assert lower[0] == lower[1]
    np.testing.assert_array_equal(upper, np.log(process.beta))
    np.testing.assert_array_equal(fixed_large[1:], np.log(process.beta[1:]))
    assert fixed_large[0] == np.log(process.posterior_variance[1])
    assert (lower[1:] < upper[1:]).all()


@pytest.mark.parametrize(("rescaled", "last"), [(False, 3999.0), (True, 999.75)])
def test_rescaled_timesteps_keep_the_networks_range(rescaled: bool, last: float) -> None:
    config = DiffusionConfig(steps=4000, schedule="cosine", rescale_timesteps=rescaled)
    process = process_from_config(config, "ddim250")
    np.testing.assert_array_equal(process.timesteps, np.arange(0, 4000, 16))
    np.testing.assert_array_equal(process.model_t, np.arange(0, 4000, 16) * (0.25 if rescaled else 1.0))
    assert process_from_config(config).model_t[-1] == last


# --- coefficients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("respacing", ["", "50"])
def test_x_0_from_each_parameterisation(respacing: str) -> None:
    """For x_t = sqrt(a) x_0 + sqrt(1 - a) eps, an exact prediction of the network gives x_0."""
    rng = np.random.default_rng(0)
    process = process_from_config(DiffusionConfig(), respacing)
    x_0, eps = rng.standard_normal((2, len(process)))
    x = np.sqrt(process.alpha_bar) * x_0 + np.sqrt(1 - process.alpha_bar) * eps
    posterior_mean = process.posterior_mean_x0 * x_0 + process.posterior_mean_xt * x
    for mean_type, out in (("eps", eps), ("x_0", x_0), ("previous_x", posterior_mean)):
        config = DiffusionConfig(mean_type=mean_type)
        from_x, from_out = (column(config, respacing, f"x0_from_{name}") for name in ("x", "out"))
        # float32 rounding of both terms, which nearly cancel where little of x_0 is left
        bound = 1e-6 * (1 + np.abs(from_x * x) + np.abs(from_out * out))
        assert (np.abs(from_x * x + from_out * out - x_0) <= bound).all(), mean_type


@pytest.mark.parametrize("mean_type", ["eps", "x_0", "previous_x"])
def test_ddpm_mean(mean_type: Any) -> None:
    config = DiffusionConfig(mean_type=mean_type)
    process = process_from_config(config, "50")
    names = ("prev_from_x0", "prev_from_x", "prev_from_out")
    found = [column(config, "50", name) for name in names]
    ones, zeros = np.ones(50), np.zeros(50)
    expected = (
        [zeros, zeros, ones]
        if mean_type == "previous_x"
        else [process.posterior_mean_x0, process.posterior_mean_xt, zeros]
    )
    np.testing.assert_allclose(found, expected, rtol=STORED, atol=1e-30)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("v", [-1.0, 0.3, 1.0])
def test_ddpm_variance(variance_type: Any, v: float) -> None:
    config = DiffusionConfig(variance_type=variance_type)
    process = process_from_config(config, "50")
    small, large = process.posterior_variance.copy(), process.beta.copy()
    small[0] = small[1]
    expected = {
        "fixed_small": small,
        "fixed_large": np.append(small[1], large[1:]),
        "learned": np.full(50, math.exp(v)),
        "learned_range": np.exp((v + 1) / 2 * np.log(large) + (1 - v) / 2 * np.log(small)),
    }[variance_type]
    log_weight = column(config, "50", "log_weight") + column(config, "50", "log_weight_from_v") * v
    # An absolute error of a logarithm of about -10, rounded to float32, is a relative one of its exponential.
    np.testing.assert_allclose(np.exp(log_weight), expected, rtol=3e-6)


def test_ddpm_guides_with_the_true_variance() -> None:
    """Algorithm 1: the mean moves by scale * variance * gradient, and fixed_small's variance ends at 0."""
    for variance_type in ("fixed_large", "learned", "learned_range"):
        guidance = column(DiffusionConfig(variance_type=variance_type), "50", "guidance", scale=3.5)
        assert (guidance == 3.5).all()
    guidance = column(DiffusionConfig(variance_type="fixed_small"), "50", "guidance", scale=3.5)
    assert guidance[0] == 0
    assert (guidance[1:] == 3.5).all()


def test_ddpm_noise_is_absent_from_the_last_step_only() -> None:
    noise = column(DiffusionConfig(), "50", "noise")
    assert noise[0] == 0
    assert (noise[1:] == 1).all()


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_keeps_the_marginals(schedule: Any, eta: float) -> None:
    """DDIM eq. 12 and 16: with the true x_0 and eps, x_{t-1} has the moments of q(x_{t-1} | x_0)."""
    config = DiffusionConfig(schedule=schedule)
    process = process_from_config(config, "50")
    from_x0, from_x, noise = (
        column(config, "50", name, method="ddim", eta=eta)
        for name in ("prev_from_x0", "prev_from_x", "noise")
    )
    a, prev = process.alpha_bar, process.alpha_bar_prev
    np.testing.assert_allclose(from_x0 + from_x * np.sqrt(a), np.sqrt(prev), rtol=1e-6)
    variance = from_x**2 * (1 - a) + noise**2
    np.testing.assert_allclose(variance, 1 - prev, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(noise**2, eta**2 * process.posterior_variance, rtol=1e-6)


def test_ddim_with_eta_1_has_the_mean_of_ddpm() -> None:
    config = DiffusionConfig()
    for name in ("prev_from_x0", "prev_from_x"):
        ddim, ddpm = (
            column(config, "50", name, method="ddim", eta=1.0),
            column(config, "50", name, method="ddpm"),
        )
        np.testing.assert_allclose(ddim, ddpm, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_ddim_guidance_moves_eps(eta: float) -> None:
    """Algorithm 2: eps - scale * sqrt(1 - a) * g, put into eq. 12 in float64."""
    config, scale, g = DiffusionConfig(), 2.5, 0.3
    process = process_from_config(config, "50")
    rng = np.random.default_rng(1)
    x_0, eps = rng.standard_normal((2, 50))
    a, prev = process.alpha_bar, process.alpha_bar_prev
    x = np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps
    moved = eps - scale * np.sqrt(1 - a) * g
    pred = (x - np.sqrt(1 - a) * moved) / np.sqrt(a)
    sigma = eta * np.sqrt(process.posterior_variance)
    expected = np.sqrt(prev) * pred + np.sqrt(1 - prev - sigma**2) * moved
    c = {
        name: column(config, "50", name, method="ddim", eta=eta, scale=scale)
        for name in ("prev_from_x0", "prev_from_x", "guidance", "x0_shift")
    }
    np.testing.assert_allclose(x_0 + c["x0_shift"] * g, pred, rtol=1e-6)
    fused = c["prev_from_x0"] * x_0 + c["prev_from_x"] * x + c["guidance"] * g
    np.testing.assert_allclose(fused, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", METHODS)
def test_unclipped_means_no_bound_below_the_largest_float(sampler: SamplerConfig) -> None:
    config = DiffusionConfig()
    clipped, unclipped = (
        column(config, "10", "clip", **(sampler.to_dict() | {"clip": clip})) for clip in (True, False)
    )
    assert (clipped == 1).all()
    assert (unclipped == np.finfo(np.float32).max).all()


@pytest.mark.parametrize("sampler", METHODS)
def test_guidance_is_linear_in_the_scale_and_nothing_else_is_touched(sampler: SamplerConfig) -> None:
    config = DiffusionConfig()
    rows, doubled, none = (
        step_coefficients(config, sampler.model_copy(update={"scale": scale, "steps": "10"}))
        for scale in (3.0, 6.0, 0.0)
    )
    guided = [UPDATE.index(name) for name in ("guidance", "x0_shift")]
    np.testing.assert_allclose(doubled[:, guided], 2 * rows[:, guided], rtol=STORED)
    assert not none[:, guided].any()
    rest = np.delete(rows, guided, axis=1)
    np.testing.assert_array_equal(np.delete(doubled, guided, axis=1), rest)
    np.testing.assert_array_equal(np.delete(none, guided, axis=1), rest)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", METHODS)
@pytest.mark.parametrize("steps", [21, 100_000])
def test_every_coefficient_is_finite_at_the_extremes(
    schedule: Any, sampler: SamplerConfig, steps: int
) -> None:
    config = DiffusionConfig(steps=steps, schedule=schedule)
    for respacing in ("2", "21"):
        rows = step_coefficients(config, sampler.model_copy(update={"steps": respacing}))
        assert rows.dtype == np.float32
        assert np.isfinite(rows).all()


def test_a_sampling_schedule_starts_at_the_noisiest_step_and_is_read_only() -> None:
    config = DiffusionConfig(steps=4000, rescale_timesteps=True)
    sampler = SamplerConfig(steps="40", scale=2.0)
    process = process_from_config(config, "40")
    schedule = sampling_schedule(config, sampler)
    assert len(schedule) == 40
    assert schedule.step.tolist() == list(range(39, -1, -1))
    np.testing.assert_array_equal(schedule.timesteps, process.timesteps[::-1])
    np.testing.assert_array_equal(schedule.model_t, process.model_t[::-1].astype(np.float32))
    np.testing.assert_array_equal(
        schedule.coefficients[:, : len(UPDATE)], step_coefficients(config, sampler)[::-1]
    )
    assert schedule.model_t.dtype == schedule.coefficients.dtype == np.float32
    for array in (schedule.model_t, schedule.coefficients, schedule.step, schedule.timesteps):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0  # it is shared by every sample of the same request
