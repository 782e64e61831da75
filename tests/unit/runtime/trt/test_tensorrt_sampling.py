"""Sampling on plans, over the stub of the driver and the double of the library: what is done, and when."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import cuda_stub
import numpy as np
import pytest
from bundles import CLASSIFIER, SAMPLER, UNET, pipeline
from engine_double import RtxRuntimeConfig
from engine_rig import Rig, on_device
from graph_calls import gradient, unet_out

from admtrt.config import DiffusionConfig
from admtrt.errors import RequestError
from admtrt.runtime.image_inputs import Known
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.sampler import advance, draw_noise, hold
from admtrt.runtime.slots import Slots, slots_for
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import UPDATE, sampling_schedule

if TYPE_CHECKING:
    from pathlib import Path

    from admtrt.runtime.drawn import Samples, Step

_ROUNDING = 2e-5  # ONNX Runtime chooses kernels by the batch size, and padding changes that


def drawn(rig: Rig, *arguments: Any, **options: Any) -> Samples:
    with rig.open() as denoiser:
        return Pipeline(rig.bundle, denoiser)(*arguments, **options)


@pytest.mark.parametrize(
    ("rtx", "order"), [(False, order) for order in cuda_stub.ORDERS] + [(True, "lazy"), (True, "eager")]
)
@pytest.mark.parametrize(
    ("name", "labels", "options"),
    [
        ("guided", [0, 1, 2, 0, 1], {"batch_size": 2}),
        ("guided", [0, 1, 2], {"method": "ddim", "steps": "ddim4", "eta": 0.5}),
        ("guided", [2, 1], {"method": "ddim", "steps": "ddim4"}),  # without noise
        ("guided", [0, 1], {"steps": 8, "guidance_interval": (0.5, 20.0)}),  # two kinds of steps in turn
        ("guided", None, {"seeds": [3, 4], "scale": 0.0}),
        ("guided", [0, 1, 2], {"method": "unipc", "steps": 6, "order": 3}),
        ("guided", [0, 1], {"method": "dpmpp", "steps": 6, "sde": True, "threshold": "dynamic"}),
        ("conditional", [3, 1], {"method": "heun", "steps": 5, "churn": (20.0, 0.05, 50.0, 1.003)}),
        ("guided", [0, 1], {"known": Known(np.full((1, 8, 8, 1), 99, np.uint8), np.eye(8)), "jump": (2, 2)}),
        ("guided", [0, 1], {"reference": np.full((1, 8, 8, 1), 99, np.uint8), "low_pass": (4, 2)}),
        ("guided", [0, 1], {"init": np.full((1, 8, 8, 1), 99, np.uint8), "strength": 0.5}),
        ("conditional", [3, 1], {}),
        ("upsampler", None, {"seeds": [1, 2], "low_res": np.full((2, 4, 4, 1), 99, np.uint8)}),
    ],
)
def test_images_are_those_of_onnx_runtime(
    name: str,
    labels: list[int] | None,
    options: dict[str, Any],
    rtx: bool,
    order: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    rig = Rig(monkeypatch, tmp_path, name, rtx=rtx, order=order)
    rig.build()
    expected = pipeline(name)(labels, **options)
    with rig.open() as denoiser:
        for _ in range(2):  # the second time by graphs from the first step on
            samples = Pipeline(rig.bundle, denoiser)(labels, **options)
            np.testing.assert_allclose(samples.x, expected.x, rtol=0, atol=_ROUNDING)


def test_the_host_waits_only_before_and_after_the_loop(rig: Rig) -> None:
    drawn(rig, [0, 1], steps=8, batch_size=2)
    log = cuda_stub.log()
    waits = [index for index, line in enumerate(log) if line.startswith("host waits")]
    steps = [index for index, line in enumerate(log) if line in ("s0: run x_prev", "s0: graph")]
    assert len(steps) == 8
    # once, when the second step captures the work of the first
    assert len([wait for wait in waits if steps[0] < wait < steps[-1]]) == 1


def test_a_step_is_enqueued_while_the_next_one_s_noise_is_drawn(rig: Rig) -> None:
    schedule = sampling_schedule(DiffusionConfig(), SAMPLER.model_copy(update={"steps": "8"}))
    slots = slots_for(UNET, CLASSIFIER, [schedule] * 2, [5, 6], labels=np.array([0, 1]), guided=True)
    done = 0
    with rig.open() as denoiser, hold(slots, denoiser) as held:
        for enqueued in range(1, 9):
            held.advance()
            # once, in the step or in the graph
            done += sum(line == "done: run x_prev" for line in cuda_stub.log())
            assert done <= max(enqueued - 2, 1)  # the second step waits for the first, to be captured


def test_a_callback_that_does_not_look_waits_for_nothing(rig: Rig) -> None:
    seen: list[int] = []
    drawn(rig, [0, 1], steps=8, callback=lambda step: seen.append(step.count))
    assert seen == [2] * 8
    quiet = sum(line.startswith("host waits") for line in cuda_stub.log())
    drawn(rig, [0, 1], steps=8, callback=lambda step: seen.append(len(step.x)))
    assert sum(line.startswith("host waits") for line in cuda_stub.log()) >= quiet + 7


def test_callbacks_see_every_step(rig: Rig) -> None:
    def states(sample: Any) -> list[np.ndarray]:
        seen: list[np.ndarray] = []
        sample([0, 2], callback=lambda step: seen.extend((step.x, step.x_0)))
        return seen

    with rig.open() as denoiser:
        ours = states(Pipeline(rig.bundle, denoiser))
    for mine, other in zip(ours, states(pipeline("guided")), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=_ROUNDING)


def test_a_late_look_is_refused(rig: Rig) -> None:
    steps: list[Step] = []
    drawn(rig, [0], callback=steps.append)
    with pytest.raises(RuntimeError, match="after step 2 are gone"):
        _ = steps[1].x
    assert np.isfinite(steps[-1].x).all()  # the last one's are the result


def test_gradient_and_unet_run_on_two_streams_that_join_before_the_update(rig: Rig) -> None:
    drawn(rig, [0], steps=2)
    runs = [line for line in cuda_stub.log() if line.startswith("s") and "run" in line]
    assert runs == ["s1: run grad", "s0: run out", "s0: run x_prev"]  # the second step is a graph


def test_steps_without_guidance_compute_no_gradient(rig: Rig) -> None:
    drawn(rig, None, seeds=[1, 2], scale=0.0)
    assert not any("grad" in line for line in cuda_stub.log())


def test_a_gradient_that_overflowed_does_not_reach_steps_without_guidance(rig: Rig) -> None:
    with rig.open() as denoiser:
        sample = Pipeline(rig.bundle, denoiser)
        sample([0, 1], steps=2)
        on_device(denoiser.buffers[2], "grad")[...] = np.nan
        assert np.isfinite(sample(None, [1, 2], scale=0.0).x).all()


def test_one_graph_for_each_batch_size_and_kind_of_step(rig: Rig) -> None:
    with rig.open() as denoiser:
        sample = Pipeline(rig.bundle, denoiser)
        sample([0, 1, 2], steps=6, batch_size=2)
        log = cuda_stub.log()
        assert log.count("s0: run out") + log.count("s2: run out") == 2  # the first step of each batch
        sample([0, 1, 2], steps=6, batch_size=2)
        log = cuda_stub.log()
        assert not any(line.startswith("s") and "run" in line for line in log)
        assert log.count("s0: graph") + log.count("s2: graph") == 12
        sample(None, [1, 2], steps=6, scale=0.0)
        assert cuda_stub.log().count("s0: run out") == 1
        assert "one CUDA graph a step" in str(denoiser)


def test_memory_of_a_batch_size_that_is_no_longer_used_is_given_back(rig: Rig) -> None:
    rig.build(scratch=0)
    before = cuda_stub.counts()
    with rig.open() as denoiser:
        sample = Pipeline(rig.bundle, denoiser)
        used = []
        for count in (1, 2, 3, 4):
            sample([0] * count, steps=3, batch_size=count)
            used.append(cuda_stub.counts()["bytes"] - before["bytes"])
        assert used[0] < used[1]
        assert used[3] - used[1] == pytest.approx((3 + 4 - 1 - 2) * used[0], rel=0.01)
    assert cuda_stub.counts() == before


@pytest.mark.parametrize("graph", ["classifier_gradient", "unet", "update"])
def test_an_engine_that_cannot_be_captured_is_enqueued_every_time(
    graph: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rig = Rig(monkeypatch, tmp_path)
    rig.build()
    rig.build([graph], capturable=False)
    with rig.open() as denoiser:
        samples = Pipeline(rig.bundle, denoiser)([0, 1])
        assert re.search(r"no CUDA graphs \(.*not permitted", str(denoiser))
    assert not any("graph" in line for line in cuda_stub.log())
    np.testing.assert_allclose(samples.x, pipeline("guided")([0, 1]).x, rtol=0, atol=_ROUNDING)


def test_rtx_makes_graphs_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rig = Rig(monkeypatch, tmp_path, rtx=True)
    rig.build()
    with rig.open() as denoiser:
        Pipeline(rig.bundle, denoiser)([0, 1])
        assert "CUDA graphs of its own" in str(denoiser)
    assert not any("graph" in line for line in cuda_stub.log())


@pytest.mark.parametrize(
    ("profiles", "count", "batch"),
    [
        (((1, 4, 8),), 3, 3),
        (((4, 4, 8),), 3, 4),  # padded up to the smallest
        (((4, 8, 8), (1, 1, 2)), 2, 2),  # served by the smaller profile
        (((4, 8, 8), (1, 1, 2)), 3, 4),
        (((1, 8, 8), (1, 2, 2)), 2, 2),
    ],
)
def test_profile_and_padding(
    profiles: Any, count: int, batch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rig = Rig(monkeypatch, tmp_path, profiles=profiles)
    rig.build()
    with rig.open() as denoiser:
        labels = [0, 1, 2][:count]
        samples = Pipeline(rig.bundle, denoiser)(labels)
        assert list(denoiser.buffers) == [batch]
        assert np.isfinite(on_device(denoiser.buffers[batch], "x")).all()  # those that fill up, too
        tightest = min(b for a, _, b in profiles if a <= batch <= b)
        assert all(
            engine.profile(batch).largest == tightest  # type: ignore[union-attr]
            for engine in denoiser.engines.values()
        )
    np.testing.assert_allclose(samples.x, pipeline("guided")(labels).x, rtol=0, atol=_ROUNDING)


def test_graphs_with_different_profiles_share_a_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rig = Rig(monkeypatch, tmp_path)
    rig.profiles |= {"unet": ((2, 2, 4),), "update": ((3, 4, 8),)}
    rig.build()
    with rig.open() as denoiser:
        assert denoiser.largest_batch == 4
        samples = Pipeline(rig.bundle, denoiser)([1])
        assert list(denoiser.buffers) == [3]
    np.testing.assert_allclose(samples.x, pipeline("guided")([1]).x, rtol=0, atol=_ROUNDING)


def test_a_batch_larger_than_every_profile_is_refused(rig: Rig) -> None:
    with pytest.raises(
        RequestError, match="batch of 9 is larger than the largest that the plans take, 8"
    ) as info:
        drawn(rig, [0] * 9)
    assert "a batch of 8 at most" in info.value.hint
    assert drawn(rig, [0] * 9, steps=2, batch_size=8).x.shape == (9, 1, 8, 8)


def test_single_graphs_on_host_arrays(rig: Rig) -> None:
    generator = np.random.default_rng(0)
    x, noise, grad = (generator.standard_normal((3, 1, 8, 8), dtype=np.float32) for _ in range(3))
    t, y = np.array([1, 500, 900], np.float32), np.array([0, 1, 2])
    schedule = sampling_schedule(DiffusionConfig(), SAMPLER)
    with rig.open() as denoiser:
        results = []
        for each in (denoiser, pipeline("guided").denoiser):
            out = unet_out(each, x, t)
            coefficients = schedule.coefficients[:3, : len(UPDATE)].copy()
            feeds = {"x": x, "out": out, "grad": grad, "noise": noise, "coefficients": coefficients}
            updated = each.run("update", feeds)
            results.append([out, gradient(each, x, t, y), updated["x_prev"], updated["pred_x0"]])
        for ours, expected in zip(*results, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=0, atol=_ROUNDING)
        assert denoiser.run("classifier_gradient", {"x": x, "t": t, "y": y})["log_prob"].shape == (3,)


def test_another_thread_may_sample(rig: Rig) -> None:
    with rig.open() as denoiser, ThreadPoolExecutor(1) as pool:
        samples = pool.submit(Pipeline(rig.bundle, denoiser), [0, 1]).result()
        assert np.isfinite(samples.x).all()
        denoiser.device.activate()


def test_held_memory_is_not_lent_twice(rig: Rig) -> None:
    with rig.open() as denoiser:
        sample = Pipeline(rig.bundle, denoiser)
        zeros = np.zeros((1, 1, 8, 8), np.float32)
        with pytest.raises(RuntimeError, match="held"):
            sample([0], callback=lambda _: unet_out(denoiser, zeros, np.zeros(1, np.float32)))
        sample([0])  # the error gave the memory back


def test_kernels_of_rtx_are_kept_between_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rig = Rig(monkeypatch, tmp_path, rtx=True)
    rig.build()
    made = RtxRuntimeConfig.made
    drawn(rig, [0], steps=2)
    files, graphs = sorted(tmp_path.glob("*-sm89.kernels")), len(rig.bundle.manifest.graphs)
    assert len(files) == graphs
    assert not any(cache.read for cache in made)
    drawn(rig, [0], steps=2)
    assert [cache.read for cache in made[graphs:]] == [[b"rtx"]] * graphs
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])  # damaged: compiled again
    drawn(rig, [0], steps=2)
    assert not any(cache.read for cache in made[2 * graphs :])
    drawn(rig, [0], steps=2)
    assert all(cache.read for cache in made[3 * graphs :])


@pytest.mark.parametrize("read", [False, True])
def test_a_sample_that_takes_another_s_place_while_held(rig: Rig, read: bool) -> None:
    """Its x, conditions and noise are its own, though noise of the one before it was drawn ahead."""
    schedule = sampling_schedule(DiffusionConfig(), SAMPLER)

    def slots(*seeds: int) -> Slots:
        labels = np.array([seed % 3 for seed in seeds])
        return slots_for(UNET, CLASSIFIER, [schedule] * len(seeds), seeds, labels=labels, guided=True)

    def drawn(held_slots: Slots, steps: int) -> Slots:
        with rig.open() as denoiser, hold(held_slots, denoiser) as held:
            for _ in range(steps):
                held.advance()
            held.read()
        return held_slots

    ours = slots(5, 6, 7)
    with rig.open() as denoiser, hold(ours, denoiser) as held:
        held.advance()
        held.advance()
        if read:
            held.read()
        held.replace([2], slots(22))
        np.testing.assert_array_equal(ours.x[2], slots(22).x[0])
        for _ in range(3):
            held.advance()
        held.read()
    others, newcomer = drawn(slots(5, 6, 7), 5), drawn(slots(22, 22, 22), 3)
    np.testing.assert_array_equal(ours.x[:2], others.x[:2])
    np.testing.assert_array_equal(ours.x[2], newcomer.x[2])
    np.testing.assert_array_equal(ours.x_0[2], newcomer.x_0[2])


def test_a_sample_takes_another_s_place_when_the_noise_is_drawn(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that draws the next step's noise reads the slots."""
    order: list[str] = []

    def slow(*arguments: Any) -> Any:
        time.sleep(0.3)
        order.append("drawn")
        return draw_noise(*arguments)

    monkeypatch.setattr("admtrt.runtime.trt.held.draw_noise", slow)
    schedule = sampling_schedule(DiffusionConfig(), SAMPLER)
    ours, newcomer = (
        slots_for(UNET, CLASSIFIER, [schedule], [seed], labels=np.array([1]), guided=True) for seed in (5, 6)
    )
    replace = Slots.replace
    monkeypatch.setattr(Slots, "replace", lambda *given: order.append("replaced") or replace(*given))
    with rig.open() as denoiser, hold(ours, denoiser) as held:
        held.advance()
        held.replace([0], newcomer)
    assert order == ["drawn", "drawn", "replaced"]  # of this step, of the next one


def test_finished_samples_make_room_for_others(rig: Rig) -> None:
    schedule = sampling_schedule(DiffusionConfig(), SAMPLER)
    plain = sampling_schedule(DiffusionConfig(), SamplerConfig(steps="9", scale=0.0))
    ours = slots_for(UNET, CLASSIFIER, [plain] * 2, [1, 2], guided=False)
    ours.position[0] = 8
    expected = ours.take([0, 1])
    newcomer = slots_for(UNET, CLASSIFIER, [schedule], [3], labels=np.array([2]), guided=True)
    with rig.open() as denoiser, hold(ours, denoiser) as held:
        held.advance()
        assert ours.finished.tolist() == [True, False]
        held.replace([0], newcomer)
        for _ in range(4):
            held.advance()
        held.read()
    advance(expected, pipeline("guided").denoiser)
    expected.replace([0], newcomer)
    for _ in range(4):
        advance(expected, pipeline("guided").denoiser)
    np.testing.assert_allclose(ours.x, expected.x, rtol=0, atol=_ROUNDING)


def test_prepared_buffers_are_kept_and_others_share_two_places(rig: Rig) -> None:
    with rig.open() as denoiser:
        sample = Pipeline(rig.bundle, denoiser)
        sample([0] * 2, steps=2)
        denoiser.prepare({"unet": [1, 3], "classifier_gradient": [5]})
        assert sorted(denoiser.buffers) == [1, 3]
        kept = denoiser.buffers[3]
        for count in (2, 4, 6, 3):
            sample([0] * count, steps=2)
        assert sorted(denoiser.buffers) == [1, 3, 4, 6]
        assert denoiser.buffers[3] is kept
        with pytest.raises(RuntimeError, match="held"):
            sample([0], steps=2, callback=lambda _: denoiser.prepare({"unet": [2]}))
        with pytest.raises(RequestError, match="batch of 9 is larger"):
            denoiser.prepare({"unet": [9]})
        assert sorted(denoiser.buffers) == [1, 3, 4, 6]
        denoiser.prepare({})
        assert not denoiser.buffers
    assert cuda_stub.free_memory() == 2**30
