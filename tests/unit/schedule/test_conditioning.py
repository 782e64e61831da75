"""Amplification of the network's rounding by the noisiest DDPM step of five (docs/numerics.md)."""

from __future__ import annotations

import numpy as np
import pytest
from schedules import step_coefficients

from admtrt.config import DiffusionConfig
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import UPDATE

ROUNDING = 1.5e-6  # of the output's largest value: what the exported ImageNet-64 UNet differs by
SHAPE = (3, 3, 64, 64)


def moved(schedule: str, seed: int) -> float:
    """Largest change of x_prev in a sample, over that sample's largest value."""
    config = DiffusionConfig(schedule=schedule)
    table = step_coefficients(config, SamplerConfig(steps="5", scale=0.0))
    row = dict(zip(UPDATE, table[-1].astype(np.float64), strict=True))
    rng = np.random.default_rng(seed)
    x, out, noise = (rng.standard_normal(SHAPE) for _ in range(3))
    error = ROUNDING * np.abs(out).max() * rng.uniform(-1, 1, SHAPE)

    def step(output: np.ndarray) -> np.ndarray:
        x_0 = np.clip(row["x0_from_x"] * x + row["x0_from_out"] * output, -1, 1)
        mean = row["prev_from_x0"] * x_0 + row["prev_from_x"] * x
        return mean + np.exp(row["log_weight"] / 2) * noise

    exact, rounded = step(out), step(out + error)
    return float((np.abs(rounded - exact).max(axis=(1, 2, 3)) / np.abs(exact).max(axis=(1, 2, 3))).max())


@pytest.mark.parametrize(("schedule", "expected"), [("cosine", 2.6e-3), ("linear", 1.4e-5)])
def test_rounding_of_the_output(schedule: str, expected: float) -> None:
    typical = np.median([moved(schedule, seed) for seed in range(20)])
    assert typical == pytest.approx(expected, rel=0.2)
