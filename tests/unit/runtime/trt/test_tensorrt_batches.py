"""Batches that mix solvers, edits, guided and unguided samples on plans, over the stub and the double."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import cuda_stub
import numpy as np
import pytest
from bundles import CLASSIFIER, SAMPLER, UNET, pipeline
from engine_rig import Rig, on_device

from admtrt.config import DiffusionConfig
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.sampler import advance, hold
from admtrt.runtime.slots import Slots, slots_for
from admtrt.schedule.edits import KnownRegion, LowPass
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import sampling_schedule

if TYPE_CHECKING:
    from pathlib import Path


_ROUNDING = 2e-5  # ONNX Runtime chooses kernels by the batch size, and padding changes that


def test_samples_of_different_samplers_and_lengths_share_a_batch(rig: Rig) -> None:
    def slots() -> Any:
        configs = [SAMPLER, SamplerConfig(method="ddim", steps="ddim8", scale=1.0), SamplerConfig(steps="6")]
        schedules = [sampling_schedule(DiffusionConfig(), config) for config in configs]
        made = slots_for(UNET, CLASSIFIER, schedules, [5, 6, 7], labels=np.array([0, 1, 2]), guided=True)
        made.position[:] = [1, 3, 0]
        return made

    expected, ours = slots(), slots()
    with rig.open() as denoiser, hold(ours, denoiser) as held:
        for _ in range(4):
            advance(expected, pipeline("guided").denoiser)
            held.advance()
        held.read()
    assert ours.position.tolist() == [5, 7, 4]
    np.testing.assert_allclose(ours.x, expected.x, rtol=0, atol=_ROUNDING)
    np.testing.assert_allclose(ours.x_0, expected.x_0, rtol=0, atol=_ROUNDING)


def test_solvers_with_memory_share_a_batch_and_leave_it(rig: Rig) -> None:
    def slots() -> Any:
        configs = [
            SAMPLER,
            SamplerConfig(method="unipc", steps="7", scale=0.0),
            SamplerConfig(method="dpmpp", steps="6", threshold="dynamic"),
        ]
        schedules = [sampling_schedule(DiffusionConfig(), config) for config in configs]
        return slots_for(UNET, CLASSIFIER, schedules, [5, 6, 7], labels=np.array([0, 1, 2]), guided=True)

    newcomer = slots().take([2])
    expected, ours = slots(), slots()
    with rig.open() as denoiser, hold(ours, denoiser) as held:
        for place in range(5):
            if place == 3:  # row 1 makes room for a new sample, whose memory is empty
                expected.replace([1], newcomer)
                held.replace([1], newcomer)
            advance(expected, pipeline("guided").denoiser)
            held.advance()
        held.read()
    for name in ("x", "x_0", "saved", "h2"):
        np.testing.assert_allclose(getattr(ours, name), getattr(expected, name), rtol=0, atol=_ROUNDING)


def test_a_sample_that_was_begun_elsewhere_brings_its_memory(rig: Rig) -> None:
    configs = [SamplerConfig(method="unipc", steps="7"), SamplerConfig(method="dpmpp", steps="6", order=3)]
    schedules = [sampling_schedule(DiffusionConfig(), config) for config in configs]
    ours = slots_for(UNET, CLASSIFIER, schedules, [5, 6], labels=np.array([0, 1]), guided=True)
    host = pipeline("guided").denoiser
    for _ in range(3):
        advance(ours, host)
    expected = ours.take([0, 1])
    with rig.open() as denoiser, hold(ours, denoiser) as held:
        for _ in range(3):
            advance(expected, host)
            held.advance()
        held.read()
    for name in ("x", "x_0", "saved", "h2"):
        np.testing.assert_allclose(getattr(ours, name), getattr(expected, name), rtol=0, atol=_ROUNDING)


def test_tensors_of_guides_are_cleared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Leftovers of a guide's graph, run for other samples, do not affect a sample without guides."""
    rig = Rig(monkeypatch, tmp_path, "steered")
    rig.build()
    with rig.open() as denoiser:
        sample = Pipeline(rig.bundle, denoiser)
        clean = sample([0, 1], method="unipc", steps=3)
        feeds = {
            each.name: np.full(each.sized(2), np.inf if "." in each.name else 0.0, np.float32)
            for each in rig.bundle.graph_entry("update_full").spec.inputs
        }
        denoiser.run("update_full", feeds)
        again = sample([0, 1], method="unipc", steps=3)
    np.testing.assert_array_equal(again.x, clean.x)


def test_edited_samples_share_a_batch_and_come_later(rig: Rig) -> None:
    reference = np.random.default_rng(1).uniform(-1, 1, (3, 1, 8, 8)).astype(np.float32)
    filters = np.random.default_rng(2).normal(size=(3, 8, 8)).astype(np.float32) / 8
    edits: Any = {
        "edit": {"mask": np.eye(8, dtype=np.float32)[None, None].repeat(3, 0), "reference": reference},
        "edit_low_pass": {"rows": filters, "columns": filters, "reference": reference},
    }

    def slots(*kinds: Any) -> Slots:
        schedules = [sampling_schedule(DiffusionConfig(), SAMPLER, None, kind) for kind in kinds]
        labels = np.array([0, 1, 2])
        return slots_for(UNET, CLASSIFIER, schedules, [5, 6, 7], labels=labels, guided=True, edits=edits)

    started = (KnownRegion((2, 2)), None, None)
    newcomer = slots(LowPass(), None, None).take([0])
    expected, ours = slots(*started), slots(*started)
    with rig.open() as denoiser, hold(ours, denoiser) as held:
        for place in range(4):
            if place == 2:
                expected.replace([1], newcomer)
                held.replace([1], newcomer)
            advance(expected, pipeline("guided").denoiser)
            held.advance()
        held.read()
    np.testing.assert_allclose(ours.x, expected.x, rtol=0, atol=_ROUNDING)


def partly_guided(guided: list[bool], steps: str = "6") -> Slots:
    """Samples of which some are guided; the first has an interval that it leaves."""
    configs = [
        SamplerConfig(steps=steps, scale=2.0 if here else 0.0, guidance_interval=None) for here in guided
    ]
    if guided[0]:
        configs[0] = SamplerConfig(steps=steps, scale=2.0, guidance_interval=(0.5, 20.0))
    schedules = [sampling_schedule(DiffusionConfig(), config) for config in configs]
    labels = np.arange(len(guided)) % 3
    seeds = list(range(len(guided)))
    return slots_for(UNET, CLASSIFIER, schedules, seeds, labels=labels, guided=True)


@pytest.mark.parametrize(
    ("rtx", "order"), [(False, order) for order in cuda_stub.ORDERS] + [(True, "lazy"), (True, "eager")]
)
@pytest.mark.parametrize(
    ("guided", "sizes"),
    [
        ([True, False, False, True, True, False, True, False], [4]),  # 3 or 4 of 8
        ([True, False, False, False, False], [1]),  # 1 or none
        ([False, True, True, True, True, True], []),  # the whole batch, and rows of it are emptied
    ],
)
def test_only_guided_samples_pay_for_the_gradient(
    guided: list[bool],
    sizes: list[int],
    rtx: bool,
    order: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    rig = Rig(monkeypatch, tmp_path, rtx=rtx, order=order)
    rig.build()
    expected, ours = partly_guided(guided), partly_guided(guided)
    with rig.open() as denoiser, hold(ours, denoiser) as held:
        for _ in range(6):
            advance(expected, pipeline("guided").denoiser)
            held.advance()
        held.read()
        (buffers,) = denoiser.buffers.values()
        assert list(buffers.gradients) == sizes
        # The values of a gradient never affect unguided samples.
        rows = np.array([schedule.guided[-1] for schedule in ours.schedules])
        assert not on_device(buffers, "grad")[~rows].any()
    np.testing.assert_allclose(ours.x, expected.x, rtol=0, atol=_ROUNDING)


@pytest.mark.parametrize("guided", [[True, False, True, False, False], [False, True, True, True]])
def test_a_gradient_that_overflowed_stays_with_its_sample(guided: list[bool], rig: Rig) -> None:
    ours, others = np.array(guided), ~np.array(guided)
    clean, spoilt, again = (partly_guided(guided) for _ in range(3))
    spoilt.x[ours] = np.nan
    with rig.open() as denoiser:
        for slots in (clean, spoilt, again):
            with hold(slots, denoiser) as held:
                for _ in range(4):
                    held.advance()
                held.read()
    assert np.isnan(spoilt.x[ours]).all()
    np.testing.assert_array_equal(spoilt.x[others], clean.x[others])
    np.testing.assert_array_equal(again.x, clean.x)


def test_one_pair_of_graphs_serves_any_rows_of_a_number(rig: Rig) -> None:
    with rig.open() as denoiser:
        for guided in ([True, False, True, False], [False, True, True, False], [False, False, True, True]):
            cuda_stub.log()
            slots = partly_guided(guided)
            with hold(slots, denoiser) as held:
                for _ in range(3):
                    held.advance()
                held.read()
            (buffers,) = denoiser.buffers.values()
        assert sum(piece[0] == 2 for piece in buffers.graphs) == 1
        assert not any(line.startswith("s") and "run" in line for line in cuda_stub.log())


def test_sizes_of_the_gradient_are_prepared_or_share_two_places(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rig = Rig(monkeypatch, tmp_path, profiles=((1, 8, 32),))
    rig.build()
    before = cuda_stub.counts()

    def taken(count: int) -> None:
        slots = partly_guided([False] * (32 - count) + [True] * count)
        with hold(slots, denoiser) as held:
            for _ in range(3):
                held.advance()

    with rig.open() as denoiser:
        denoiser.prepare({"unet": [32], "classifier_gradient": [4, 32, 40, 0]})
        (buffers,) = denoiser.buffers.values()
        assert list(buffers.gradients) == [4]
        kept = buffers.gradients[4]
        for count in (1, 2, 7, 3, 12, 1):  # the last is made anew, and runs once before it is captured
            taken(count)
        assert buffers.gradients[4] is kept
        del kept  # it holds memory of the device
        assert sorted(buffers.gradients) == [1, 4, 16]
        assert {piece[0] for piece in buffers.graphs if piece[1] is None} <= {1, 4, 16}
        assert not buffers.capture_fault
        denoiser.prepare({"unet": [32]})
        assert not buffers.gradients
    assert cuda_stub.counts() == before


def test_the_gradient_s_own_profiles_decide_its_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rig = Rig(monkeypatch, tmp_path)
    rig.profiles["classifier_gradient"] = ((3, 4, 8),)
    rig.build()
    guided = [False, True, False, False, False]
    expected, ours = partly_guided(guided), partly_guided(guided)
    with rig.open() as denoiser, hold(ours, denoiser) as held:
        for _ in range(3):
            advance(expected, pipeline("guided").denoiser)
            held.advance()
        held.read()
        (buffers,) = denoiser.buffers.values()
        assert list(buffers.gradients) == [3]
    np.testing.assert_allclose(ours.x, expected.x, rtol=0, atol=_ROUNDING)


def test_kernels_for_gathered_rows_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rig = Rig(monkeypatch, tmp_path, rtx=True)
    rig.build()
    kept: list[str] = []
    with rig.open() as denoiser:
        for graph, kernels in denoiser.kernels.items():
            monkeypatch.setattr(kernels, "keep", functools.partial(kept.append, graph))
        for guided in ([True] * 4, [False, True, False, False]):
            for expected in (sorted(denoiser.kernels), []):
                with hold(partly_guided(guided), denoiser) as held:
                    held.advance()
                assert sorted(kept) == expected
                kept.clear()
