"""Diffusers' spacings of timesteps: what they keep, what they imply, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from admtrt.config import DiffusionConfig
from admtrt.errors import RequestError
from admtrt.schedule.process import retained_timesteps
from admtrt.schedule.sampler import SamplerConfig, with_choices
from admtrt.schedule.table import sampling_schedule

PROCESS = DiffusionConfig(variance_type="fixed_small")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("leading:4", (0, 250, 500, 750)),
        ("leading:3", (0, 333, 666)),
        (" leading:4+1 ", (1, 251, 501, 751)),
        ("linspace:4", (0, 333, 666, 999)),
        ("trailing:4", (249, 499, 749, 999)),
        ("trailing:3", (332, 666, 999)),
        ("trailing:1", (999,)),
        ("leading:1", (0,)),
    ],
)
def test_spacings(text: str, expected: tuple[int, ...]) -> None:
    assert retained_timesteps(1000, text) == expected


@given(steps=st.integers(2, 3000), data=st.data())
def test_every_number_of_steps(steps: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, steps))
    for kind in ("leading", "linspace", "trailing"):
        kept = np.array(retained_timesteps(steps, f"{kind}:{count}"))
        assert len(kept) == count
        assert (np.diff(kept) > 0).all()
        assert kept[0] >= 0
        assert kept[-1] == steps - 1 or kind == "leading" or (kind == "linspace" and count == 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("leading", "is no spacing"),
        ("leading:", "is no spacing"),
        ("leading:0", "is no spacing"),
        ("leading:-1", "is no spacing"),
        ("leading:5+", "is no spacing"),
        ("leading:5-1", "is no spacing"),
        ("trailing:5+1", "is no spacing"),
        ("linspace:5+1", "is no spacing"),
        ("trailing:2.5", "is no spacing"),
        ("leading:٣", "is no spacing"),
        ("linspace:" + "9" * 50, "is no spacing"),
        ("leading:1001", "1000 timesteps cannot give 1001"),
        ("leading:1000+1", "reaches timestep 1000 of 1000"),
        ("leading:50+20", "reaches timestep 1000 of 1000"),
    ],
)
def test_impossible_spacings(text: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        retained_timesteps(1000, text)
    assert message in caught.value.message


def test_the_offset_that_is_named_is_possible() -> None:
    with pytest.raises(RequestError) as caught:
        retained_timesteps(1000, "leading:50+20")
    assert "19 or less" in caught.value.hint
    assert retained_timesteps(1000, "leading:50+19")[-1] == 999


def test_spacings_keep_the_method_of_the_bundle() -> None:
    ddim, ddpm = SamplerConfig(method="ddim", steps="ddim25"), SamplerConfig(steps="250")
    fast = SamplerConfig(method="unipc", steps="10")
    for text in ("leading:10", "linspace:10", "trailing:10"):
        assert with_choices(ddim, PROCESS, {"steps": text}).method == "ddim"
        assert with_choices(ddpm, PROCESS, {"steps": text}).method == "ddpm"
        assert with_choices(fast, PROCESS, {"steps": text}).method == "ddpm"
        assert with_choices(ddpm, PROCESS, {"steps": text, "method": "ddim"}).method == "ddim"
    assert with_choices(ddim, PROCESS, {"steps": "10"}).method == "ddpm"


@pytest.mark.parametrize("method", ["dpmpp", "unipc", "heun"])
def test_other_solvers_take_no_spacing(method: str) -> None:
    for grid in ("time_uniform", "respaced"):
        sampler = SamplerConfig(method=method, steps="leading:10", grid=grid, scale=0.0)
        with pytest.raises(RequestError, match="leading:10"):
            sampling_schedule(PROCESS, sampler)


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range", "learned"])
def test_one_step_leads_to_the_prediction(method: str, variance: str) -> None:
    process = DiffusionConfig.from_dict({"variance_type": variance})
    sampler = SamplerConfig(method=method, steps="trailing:1", scale=0.0)
    schedule = sampling_schedule(process, sampler)
    table = dict(zip(("prev_from_x0", "prev_from_x"), schedule.coefficients[0, 4:6], strict=True))
    assert np.isfinite(schedule.coefficients).all()
    assert table["prev_from_x0"] == pytest.approx(1.0)
    assert abs(table["prev_from_x"]) < 1e-7
