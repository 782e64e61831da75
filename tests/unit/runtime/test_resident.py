"""Slots that a denoiser keeps on its device, and slots that stay in host memory."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from bundles import CLASSIFIER, SAMPLER, UNET, sham_bundle

from admtrt.config import DiffusionConfig
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.sampler import advance, draw_noise, hold, step_inputs
from admtrt.runtime.slots import Slots, slots_for
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import UPDATE, sampling_schedule

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from admtrt.runtime.drawn import Step

SHAPE = (1, 8, 8)


class Arithmetic:
    """Fast graphs whose outputs identify their inputs."""

    def run(self, graph: str, feeds: Any) -> dict[str, Any]:
        if graph == "unet":
            return {"out": feeds["x"] * np.float32(0.5) + _wide(feeds["t"]) / 1000}
        if graph == "classifier_gradient":
            return {"grad": feeds["x"] * np.float32(0.1) + _wide(feeds["y"].astype(np.float32))}
        guidance, z = (feeds["coefficients"][:, UPDATE.index(name)] for name in ("guidance", "noise"))
        x_0 = feeds["out"] + np.float32(0.01) * _wide(guidance) * feeds["grad"]
        return {"x_prev": x_0 + np.float32(0.1) * _wide(z) * feeds["noise"], "pred_x0": x_0}


def _wide(values: Any) -> Any:
    return values[:, None, None, None]


class Resident(Arithmetic):
    """Keeps x to itself, and hands it out when it is read."""

    def __init__(self) -> None:
        self.log: list[str] = []

    @contextlib.contextmanager
    def hold(self, slots: Slots) -> Iterator[Any]:
        self.log.append("hold")
        yield _Kept(slots, self.log)
        self.log.append("release")


class _Kept:
    def __init__(self, slots: Slots, log: list[str]) -> None:
        self.slots, self.log, self.kept = slots, log, (slots.x, slots.x_0)

    def advance(self) -> None:
        self.log.append("advance")
        (x, x_0), slots = self.kept, self.slots
        slots.x = x
        advance(slots, Arithmetic())  # type: ignore[arg-type]
        self.kept = slots.x, slots.x_0
        slots.x, slots.x_0 = np.full_like(x, np.nan), np.full_like(x_0, np.nan)

    def read(self) -> None:
        self.log.append("read")
        self.slots.x, self.slots.x_0 = self.kept

    def replace(self, rows: Any, slots: Slots) -> None:
        self.read()
        self.slots.replace(rows, slots)
        self.kept = self.slots.x, self.slots.x_0


def mixed() -> Slots:
    configs = [SAMPLER, SamplerConfig(method="ddim", steps="ddim8"), SamplerConfig(steps="6", scale=0.0)]
    schedules = [sampling_schedule(DiffusionConfig(), config) for config in configs]
    slots = slots_for(UNET, CLASSIFIER, schedules, [5, 6, 7], labels=np.array([0, 1, 2]), guided=True)
    slots.position[:] = [1, 3, 0]
    return slots


def test_step_inputs_are_each_sample_s_own() -> None:
    slots = mixed()
    inputs = step_inputs(slots)
    for row, schedule in enumerate(slots.schedules):
        at = slots.position[row]
        assert inputs.t[row] == schedule.model_t[at]
        np.testing.assert_array_equal(inputs.coefficients[row], schedule.coefficients[at, : len(UPDATE)])
    assert inputs.guided.tolist() == [True, True, False]
    assert inputs.noise_steps == [3, 4, 5]
    noise = draw_noise(slots, inputs)
    assert noise is not None
    assert noise.shape == (3, *SHAPE)
    assert slots.position.tolist() == [1, 3, 0]  # nothing was advanced


def test_what_no_step_needs_is_left_out() -> None:
    slots = mixed()
    slots.schedules = [slots.schedules[1]] * 3  # DDIM: no noise
    assert step_inputs(slots).noise_steps is None
    assert draw_noise(slots, step_inputs(slots)) is None
    slots.schedules = [sampling_schedule(DiffusionConfig(), SamplerConfig(steps="6", scale=0.0))] * 3
    assert not step_inputs(slots).guided.any()
    slots = mixed()
    del slots.conditions["classifier_gradient"]
    assert not step_inputs(slots).guided.any()


@pytest.mark.parametrize("denoiser", [Arithmetic(), Resident()])
def test_held_slots_advance_as_others_do(denoiser: Any) -> None:
    expected, slots = mixed(), mixed()
    with hold(slots, denoiser) as held:
        for _ in range(3):
            advance(expected, Arithmetic())  # type: ignore[arg-type]
            held.advance()
        held.read()
    assert slots.position.tolist() == expected.position.tolist() == [4, 6, 3]
    np.testing.assert_array_equal(slots.x, expected.x)
    np.testing.assert_array_equal(slots.x_0, expected.x_0)


@pytest.mark.parametrize("denoiser", [Arithmetic(), Resident()])
def test_a_sample_that_takes_another_s_place_is_as_alone(denoiser: Any) -> None:
    """Equal bit for bit, and the other samples are not affected."""
    schedule = sampling_schedule(DiffusionConfig(), SAMPLER)
    expected, slots = mixed(), mixed()
    alone = slots_for(UNET, CLASSIFIER, [schedule], [99], labels=np.array([2]), guided=True)
    newcomer = alone.take([0])
    with hold(slots, denoiser) as held:
        held.advance()
        held.replace([1], newcomer)
        assert slots.position.tolist() == [2, 0, 1]
        for _ in range(3):
            held.advance()
        held.read()
    for _ in range(3):
        advance(alone, Arithmetic())  # type: ignore[arg-type]
    for _ in range(4):
        advance(expected, Arithmetic())  # type: ignore[arg-type]
    for row, (other, its) in enumerate([(expected, 0), (alone, 0), (expected, 2)]):
        np.testing.assert_array_equal(slots.x[row], other.x[its])
        np.testing.assert_array_equal(slots.x_0[row], other.x_0[its])
    assert slots.seeds == [5, 99, 7]


def test_the_pipeline_holds_each_batch_and_reads_at_the_end(tmp_path: Path) -> None:
    denoiser, bundle = Resident(), sham_bundle(tmp_path / "b")
    samples = Pipeline(bundle, denoiser)([0, 1, 2], batch_size=2)  # type: ignore[arg-type]
    assert denoiser.log == (["hold", *["advance"] * 5, "read", "release"]) * 2
    expected = Pipeline(bundle, Arithmetic())([0, 1, 2], batch_size=2)  # type: ignore[arg-type]
    np.testing.assert_array_equal(samples.x, expected.x)


def test_only_a_look_at_the_images_reads_them(tmp_path: Path) -> None:
    denoiser, bundle = Resident(), sham_bundle(tmp_path / "b")
    sample = Pipeline(bundle, denoiser)  # type: ignore[arg-type]
    sample([0], callback=lambda step: None)
    assert denoiser.log.count("read") == 1
    denoiser.log.clear()
    seen = []

    def look(step: Step) -> None:
        if step.index == 2:
            seen.append((step.x, step.x_0, step.x))

    sample([0], callback=look)
    assert denoiser.log.count("read") == 2
    assert np.isfinite(seen[0]).all()


def test_a_step_remembers_what_was_seen_and_nothing_else(tmp_path: Path) -> None:
    steps: list[Step] = []

    def look(step: Step) -> None:
        steps.append(step)
        if step.index == 1:
            assert step.x.shape == (1, *SHAPE)

    Pipeline(sham_bundle(tmp_path / "b"), Resident())([0], callback=look)  # type: ignore[arg-type]
    assert steps[0].x is steps[0].x
    assert np.isfinite(steps[0].x_0).all()
    with pytest.raises(RuntimeError, match="after step 3 are gone; look at them during the callback"):
        _ = steps[2].x_0
    assert np.isfinite(steps[4].x).all()
