"""Schedules that are edited, entered half-way or inverted: their rows, and the inputs in their slots."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from bundles import CLASSIFIER, UNET, pipeline
from goldens import metadata

from admtrt.config import DiffusionConfig, EdmConfig
from admtrt.errors import RequestError
from admtrt.models.denoiser import SMALL_GRAPHS
from admtrt.runtime.noise import initial_noise, second_noise, step_noise
from admtrt.runtime.sampler import advance
from admtrt.runtime.slots import Slots, slots_for
from admtrt.schedule.edits import EDIT, KnownRegion, LowPass
from admtrt.schedule.inversion import decoding_schedule, inversion_schedule
from admtrt.schedule.jumps import MOST_EVALUATIONS, evaluated_steps
from admtrt.schedule.process import process_from_config
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.solvers import SOLVERS
from admtrt.schedule.table import UPDATE_FULL, SamplingSchedule, sampling_schedule

PROCESS = DiffusionConfig()
PLAIN = SamplerConfig(steps="6", scale=0.0)
DDIM = SamplerConfig(method="ddim", steps="6", scale=0.0)
ALPHA_BAR = process_from_config(PROCESS, "6").alpha_bar
SHAPE = (1, 8, 8)
RNG = np.random.default_rng(0)
REFERENCE = RNG.uniform(-1, 1, (2, *SHAPE)).astype(np.float32)
MASK = (RNG.uniform(size=(2, 1, 8, 8)) < 0.5).astype(np.float32)
FILTERS = RNG.normal(size=(2, 2, 8, 8)).astype(np.float32)
KNOWN: Any = {"edit": {"mask": MASK, "reference": REFERENCE}}
FILTERED: Any = {"edit_low_pass": {"rows": FILTERS[0], "columns": FILTERS[1], "reference": REFERENCE}}


def column(schedule: SamplingSchedule, name: str) -> np.ndarray:
    return schedule.edits[:, EDIT.index(name)]


# --- jumps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", metadata("image_starts")["repaint_times"], ids=lambda case: str(case["sha256"][:6])
)
def test_times_are_those_of_repaint(case: dict[str, Any]) -> None:
    jump = (case["jump_length"], case["jump_n_sample"])
    if jump[0] >= case["t_T"]:
        with pytest.raises(RequestError, match="do not fit in"):
            evaluated_steps(case["t_T"], jump)
        return
    steps = evaluated_steps(case["t_T"], jump)
    assert len(steps) == case["reverse"]
    times = [steps[0]]
    for step, following in pairwise([*steps, -1]):
        times += range(step - 1, following + 1) if following >= step else [following]
    assert len(times) == case["length"]
    assert hashlib.sha256(",".join(map(str, times)).encode()).hexdigest() == case["sha256"]


def test_too_many_evaluations() -> None:
    with pytest.raises(RequestError, match=f"at most {MOST_EVALUATIONS}"):
        evaluated_steps(1000, (1, 10**12))


# --- rows ------------------------------------------------------------------------------------------------


def test_a_known_region_is_noised_to_the_level_of_the_next_evaluation() -> None:
    schedule = sampling_schedule(PROCESS, PLAIN, None, KnownRegion())
    following = np.append(ALPHA_BAR[::-1][1:], 1.0)
    np.testing.assert_allclose(column(schedule, "reference"), np.sqrt(following), rtol=1e-6)
    np.testing.assert_allclose(column(schedule, "noise"), np.sqrt(1 - following), rtol=1e-6)
    assert column(schedule, "keep").all()
    assert not column(schedule, "renoise").any()
    np.testing.assert_array_equal(schedule.coefficients, sampling_schedule(PROCESS, PLAIN).coefficients)
    original = sampling_schedule(PROCESS, PLAIN, None, KnownRegion(as_sampled=True))
    assert column(original, "keep").tolist() == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("sampler", [PLAIN, DDIM.model_copy(update={"scale": 2.0, "eta": 0.5})])
def test_a_jump_goes_into_the_row_s_own_columns(sampler: SamplerConfig) -> None:
    plain = sampling_schedule(PROCESS, sampler)
    schedule = sampling_schedule(PROCESS, sampler, None, KnownRegion((2, 2)))
    steps = evaluated_steps(6, (2, 2))
    assert schedule.step.tolist() == list(range(len(steps)))[::-1]
    for row, (step, following) in enumerate(pairwise(steps)):
        reached = step - 1
        c = np.sqrt(ALPHA_BAR[following] / ALPHA_BAR[reached])
        assert column(schedule, "renoise")[row] == pytest.approx(np.sqrt(1 - c**2), abs=1e-7)
        assert schedule.timestep(row) == plain.timestep(5 - step)
        for index, name in enumerate(UPDATE_FULL):
            factor = c if name.startswith("prev_from") or name in ("guidance", "noise", "shift") else 1.0
            expected = plain.coefficients[5 - step, index] * factor
            assert schedule.coefficients[row, index] == pytest.approx(expected, rel=2e-7), name


def test_a_low_pass_is_noised_to_the_level_of_the_evaluation() -> None:
    schedule = sampling_schedule(PROCESS, PLAIN, None, LowPass(2))
    assert column(schedule, "keep").tolist() == [1, 1, 1, 0, 0, 0]
    np.testing.assert_allclose(column(schedule, "reference")[:3], np.sqrt(ALPHA_BAR[::-1][:3]), rtol=1e-6)
    with pytest.raises(RequestError, match="holds in none of 6 evaluations"):
        sampling_schedule(PROCESS, PLAIN, None, LowPass(5))


@pytest.mark.parametrize("name", [name for name, one in SOLVERS.items() if one.steps != "respacing"])
def test_other_solvers_refuse_by_name(name: str) -> None:
    process = PROCESS if "discrete" in SOLVERS[name].processes else EdmConfig(boundary=True)
    sampler = SamplerConfig(method=name, steps=SOLVERS[name].default_steps, scale=0.0)
    with pytest.raises(RequestError, match=f"go with ddim and ddpm, not with {name}"):
        sampling_schedule(process, sampler, None, KnownRegion())


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_starts_at_an_image(name: str) -> None:
    """The first state is q(x_t | x_0) of its first evaluation, and the end stays an image."""
    solver = SOLVERS[name]
    process = PROCESS if "discrete" in solver.processes else EdmConfig(boundary=True)
    steps = {"heun": "9", "consistency": "2"}.get(name, "8")
    sampler = SamplerConfig(method=name, steps=steps, scale=0.0)
    whole = sampling_schedule(process, sampler)
    for count in range(1, len(whole) + 1):
        schedule = sampling_schedule(process, sampler, count)
        assert 1 <= len(schedule) <= count
        assert schedule.sigma[0] == pytest.approx(whole.sigma[-len(schedule)], rel=1e-9)
        noise = np.hypot(schedule.init_scale, schedule.init_noise)
        assert noise / schedule.init_signal == pytest.approx(schedule.sigma[0], rel=1e-9)
        if solver.steps == "respacing":
            np.testing.assert_array_equal(schedule.coefficients, whole.coefficients[-count:])


def test_inversion_goes_up_what_decoding_comes_down() -> None:
    """With a network that predicts the same eps everywhere, the way back undoes every step."""
    eps, x_0 = RNG.normal(size=(2, 50))
    up, down = inversion_schedule(PROCESS, DDIM, 4), decoding_schedule(PROCESS, DDIM, 4)
    assert (len(up), up.init_signal, up.init_scale) == (4, 1.0, 0.0)
    assert (len(down), down.init_signal, down.init_scale) == (5, 0.0, 1.0)
    assert up.model_t.tolist() == down.model_t.tolist()[:0:-1]
    states = [x_0]
    for schedule in (up, down):
        for row in schedule.coefficients.astype(np.float64):
            c = dict(zip(UPDATE_FULL, row, strict=True))
            prediction = c["x0_from_x"] * states[-1] + c["x0_from_out"] * eps
            states.append(c["prev_from_x0"] * prediction + c["prev_from_x"] * states[-1])
    for risen, fallen in zip(states[1:5], states[7:3:-1], strict=True):
        np.testing.assert_allclose(fallen, risen, rtol=0, atol=1e-4)
    # The image counted as the state at the first step: what is left is that step's noise.
    a = ALPHA_BAR[0]
    np.testing.assert_allclose(states[-1], (x_0 - np.sqrt(1 - a) * eps) / np.sqrt(a), rtol=0, atol=1e-4)


@pytest.mark.parametrize("levels", [0, 6, -1])
def test_levels_that_there_are_not(levels: int) -> None:
    with pytest.raises(RequestError, match="out of range; steps '6' have 5 above an image"):
        inversion_schedule(PROCESS, DDIM, levels)


# --- noise -----------------------------------------------------------------------------------------------


def test_the_second_noise_is_its_own() -> None:
    drawn = [
        second_noise([7], [step], SHAPE, stage=stage).tobytes() for step in (0, 1, 999) for stage in (0, 64)
    ]
    drawn += [step_noise([7], [step], SHAPE).tobytes() for step in (0, 1, 999)]
    drawn += [initial_noise([7], SHAPE).tobytes()]
    assert len(set(drawn)) == len(drawn)
    together = second_noise([1, 7], [3, 999], SHAPE)
    np.testing.assert_array_equal(together[1:], second_noise([7], [999], SHAPE))
    assert abs(float(second_noise([7], [0], (64, 64)).std()) - 1) < 0.05


# --- slots -----------------------------------------------------------------------------------------------


def held(schedule: SamplingSchedule, edits: Any, *seeds: int) -> Slots:
    return slots_for(UNET, CLASSIFIER, [schedule] * len(seeds), seeds, guided=False, edits=edits)


def known(*seeds: int, jump: tuple[int, int] | None = None) -> Slots:
    return held(sampling_schedule(PROCESS, PLAIN, None, KnownRegion(jump)), KNOWN, *seeds)


def filtered(*seeds: int) -> Slots:
    return held(sampling_schedule(PROCESS, DDIM, None, LowPass()), FILTERED, *seeds)


def plain(*seeds: int) -> Slots:
    return held(sampling_schedule(PROCESS, PLAIN), None, *seeds)


def finish(slots: Slots) -> np.ndarray:
    """Advance samples that may have schedules of different lengths, each to its end."""
    denoiser, done = pipeline("guided").denoiser, np.empty_like(slots.x)
    left = np.arange(len(slots))
    while len(left):
        advance(slots, denoiser)
        over = slots.finished
        done[left[over]] = slots.x[over]
        slots, left = slots.take(~over), left[~over]
    return done


def test_edited_and_other_samples_share_a_batch() -> None:
    parts = [known(1, 2, jump=(2, 2)), filtered(3, 4), plain(5), known(6, 7)]
    together = finish(Slots.join(parts).take([4, 3, 0, 1, 2, 5, 6]))
    alone = [finish(part) for part in ([known(1, 2, jump=(2, 2)), filtered(3, 4), plain(5), known(6, 7)])]
    expected = np.concatenate(alone)[[4, 3, 0, 1, 2, 5, 6]]
    # Equal noise and equal rows; what differs is the networks' rounding at another batch size.
    np.testing.assert_allclose(together, expected, rtol=0, atol=2e-4)


def test_edits_change_only_what_they_should() -> None:
    bare = finish(plain(1, 2))
    region = finish(known(1, 2))
    mask = MASK.astype(bool)
    np.testing.assert_allclose(region[mask], REFERENCE[mask], rtol=0, atol=1e-6)
    assert (np.abs(region - bare)[~mask] > 1e-3).any()
    assert np.abs(finish(known(1, 2, jump=(2, 2))) - region)[~mask].max() > 1e-3


def test_with_all_known_every_state_is_the_noised_image() -> None:
    """diffusers' RePaint once had the known part one level off (its PR 1582)."""
    slots = known(1, 2, jump=(1, 2))
    slots.conditions["edit"] = {"mask": np.ones_like(MASK), "reference": REFERENCE}
    schedule = slots.schedules[0]
    for row, step in enumerate(schedule.step.tolist()):
        advance(slots, pipeline("guided").denoiser)
        z = second_noise([1, 2], [step] * 2, SHAPE)
        a = 1.0 if row + 1 == len(schedule) else 1 / (1 + schedule.sigma[row + 1] ** 2)
        np.testing.assert_allclose(slots.x, np.sqrt(a) * REFERENCE + np.sqrt(1 - a) * z, rtol=0, atol=2e-6)


def test_taken_and_replaced_samples_carry_their_frames() -> None:
    slots = Slots.join([known(1, 2), filtered(3, 4)])
    assert slots.conditions["edit"]["mask"][2:].any() == np.False_
    newcomer = known(8, 9).take([0])
    slots.replace([1], newcomer)
    np.testing.assert_array_equal(slots.conditions["edit"]["mask"][1], newcomer.conditions["edit"]["mask"][0])
    assert slots.schedules[1] is newcomer.schedules[0]
    np.testing.assert_array_equal(slots.conditions["edit_low_pass"]["rows"][3], FILTERS[0, 1])
    bare = plain(5)
    bare.schedules = known(5, 6).schedules[:1]
    with pytest.raises(ValueError, match="no conditions of 'edit', which their schedules use"):
        Slots.join([bare, known(1, 2)])


@pytest.mark.parametrize("edits", [KNOWN, FILTERED])
def test_pytorch_edits_alike(edits: Any) -> None:
    import torch

    ((graph, given),) = edits.items()
    feeds = {
        "x_prev": RNG.normal(size=(2, *SHAPE)).astype(np.float32),
        "noise2": RNG.normal(size=(2, *SHAPE)).astype(np.float32),
        "coefficients": RNG.uniform(size=(2, len(EDIT))).astype(np.float32),
        **given,
    }
    ours = pipeline("guided").denoiser.run(graph, feeds)["x_edited"]
    theirs = SMALL_GRAPHS[graph](**{name: torch.from_numpy(one) for name, one in feeds.items()})
    np.testing.assert_allclose(ours, theirs["x_edited"].numpy(), rtol=0, atol=1e-5)
