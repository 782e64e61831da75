"""Guidance on an interval of noise levels: which steps are guided, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bundles import pipeline

from admtrt.bundle import Bundle
from admtrt.config import DiffusionConfig
from admtrt.errors import ConfigError, RequestError
from admtrt.runtime.pipeline import Pipeline
from admtrt.schedule.process import process_from_config
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import UPDATE, sampling_schedule

DIFFUSION = DiffusionConfig()
GUIDED = [UPDATE.index("guidance"), UPDATE.index("x0_shift")]
OTHERS = [index for index in range(len(UPDATE)) if index not in GUIDED]


def rows(**fields: Any) -> np.ndarray:
    return sampling_schedule(DIFFUSION, SamplerConfig(**{"steps": "20", "scale": 3.0} | fields)).coefficients


def sigmas() -> np.ndarray:
    """Of the steps in sampling order."""
    alpha_bar = process_from_config(DIFFUSION, "20").alpha_bar[::-1]
    return np.sqrt((1 - alpha_bar) / alpha_bar)


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_guidance_outside_is_zero_and_inside_as_before(method: str) -> None:
    everywhere, within = rows(method=method), rows(method=method, guidance_interval=(0.3, 3.0))
    inside = (sigmas() > 0.3) & (sigmas() <= 3.0)
    assert 3 < inside.sum() < 17
    assert (within[~inside][:, GUIDED] == 0).all()
    assert np.array_equal(within[inside], everywhere[inside])
    assert np.array_equal(within[:, OTHERS], everywhere[:, OTHERS])
    assert everywhere[:, GUIDED].any(axis=1).all()


def test_the_upper_end_belongs_to_it_and_the_lower_does_not() -> None:
    levels = sigmas()
    guided = rows(guidance_interval=(levels[12], levels[4]))[:, GUIDED].any(axis=1)
    assert np.flatnonzero(guided).tolist() == list(range(4, 12))


def test_an_interval_of_everything_is_none() -> None:
    assert np.array_equal(rows(guidance_interval=(0.0, 1e9)), rows())


class Counting:
    """A denoiser that counts gradients."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.gradients = 0

    def run(self, graph: str, feeds: Any) -> Any:
        self.gradients += graph == "classifier_gradient"
        return self.inner.run(graph, feeds)


def test_no_gradient_is_computed_outside_and_images_change() -> None:
    guided = pipeline("guided")
    counting = Counting(guided.denoiser)
    drawn = {}
    for interval in (None, (0.3, 3.0)):
        counting.gradients = 0
        samples = Pipeline(guided.bundle, counting)([0, 1], steps="20", scale=3.0, guidance_interval=interval)
        drawn[interval] = samples.x
        expected = rows(guidance_interval=interval)[:, GUIDED].any(axis=1).sum()
        assert counting.gradients == expected
    assert np.abs(drawn[None] - drawn[0.3, 3.0]).max() > 1e-3


@pytest.mark.parametrize(
    ("interval", "message"),
    [
        ((3.0, 0.3), "3 to 0.3 is empty"),
        ((1.0, 1.0), "1 to 1 is empty"),
        ((-1.0, 1.0), "guidance_interval.0"),
        ((0.0, float("inf")), "guidance_interval.1"),
        ((float("nan"), 1.0), "guidance_interval.0"),
        ((1.0,), "guidance_interval"),
        ("0.3:3", "guidance_interval"),
    ],
)
def test_refused(interval: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplerConfig.from_dict({"guidance_interval": interval})


def test_an_interval_without_a_step_is_refused_when_asked_for() -> None:
    with pytest.raises(RequestError, match=r"500 to 600 holds none of the 5 steps, whose noise levels are 0"):
        pipeline("guided").sampler(guidance_interval=(500.0, 600.0))


def test_an_interval_where_nothing_is_guided() -> None:
    with pytest.raises(RequestError, match=r"at scale 0 nothing is guided"):
        pipeline("guided").sampler(guidance_interval=(0.3, 3.0), scale=0.0)
    guided = pipeline("guided")
    manifest = guided.bundle.manifest
    recommended = manifest.sampler.model_copy(update={"guidance_interval": (500.0, 600.0)})
    bundle = Bundle(
        guided.bundle.path, manifest.model_copy(update={"sampler": recommended}), guided.bundle.digest
    )
    assert Pipeline(bundle, guided.denoiser).sampler(scale=0.0).guidance_interval is None
