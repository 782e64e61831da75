"""Axes of steps and timesteps are ticked at whole numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from admtrt.verify.drift import DriftReport, GraphDrift, StepDrift
from admtrt.verify.drift_plot import precision_drift_figure
from admtrt.verify.plot import drift_figure
from admtrt.verify.report import VerificationReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LENGTHS = (1, 2, 3, 5, 25, 250)


def ticks_in_view(axes: Axes) -> list[float]:
    low, high = axes.get_xlim()
    return [tick for tick in axes.get_xticks().tolist() if low <= tick <= high]


def check_whole(axes: Axes) -> None:
    ticks = ticks_in_view(axes)
    assert ticks
    assert all(tick == round(tick) for tick in ticks), ticks
    assert len(ticks) <= 12


@pytest.mark.parametrize("length", LENGTHS)
def test_steps_of_a_verification(length: int) -> None:
    report = VerificationReport("bundle", (), {"ddpm": tuple(np.geomspace(1e-7, 1e-6, length))})
    check_whole(drift_figure(report).axes[0])


@pytest.mark.parametrize("length", LENGTHS)
def test_steps_and_timesteps_of_a_drift(length: int) -> None:
    along, across = precision_drift_figure(drift_of(length, "timestep"), "title").axes
    check_whole(along)
    check_whole(across)


def test_noise_levels_of_a_drift_are_logarithmic() -> None:
    along, across = precision_drift_figure(drift_of(5, "noise level"), "title").axes
    check_whole(along)
    assert across.get_xscale() == "log"
    assert 0.1 in across.get_xticks()


def drift_of(length: int, axis: str) -> DriftReport:
    low, high = (0, 4) if axis == "timestep" else (0.01, 10)
    edges = np.linspace(low, high, 3)
    return DriftReport(
        images=2,
        axis=axis,  # type: ignore[arg-type]
        graphs=tuple(
            GraphDrift("unet", first, last, 1e-3, 2e-3, 1.0, 1.0)
            for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        ),
        steps=tuple(StepDrift(None, 1.0, 1e-3, 2e-3) for _ in range(length)),
        mean_psnr=50.0,
        min_psnr=40.0,
        max_levels=1.0,
    )
