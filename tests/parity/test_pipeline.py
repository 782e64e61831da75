"""The pipeline on real exported graphs: a sample does not depend on the other samples of its batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bundles import CLASSIFIER, SAMPLER, UNET, exported_bundle, network, pipeline

from admtrt import Pipeline as PublicPipeline
from admtrt.config import DiffusionConfig
from admtrt.contract import GraphName
from admtrt.models.diffusion import Diffusion
from admtrt.models.solvers import sample_step
from admtrt.runtime.drawn import Samples, Step
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.sampler import Denoiser, advance
from admtrt.runtime.slots import Slots, slots_for
from admtrt.schedule.process import process_from_config
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import sampling_schedule

SEEDS = [11, 5, 2**64 - 1, 0, 7, 3, 2, 99, 1, 4, 6, 8, 2**32, 13, 14, 15, 16]
LABELS = [seed % 3 for seed in SEEDS]
LOW_RES = np.random.default_rng(0).integers(0, 256, (len(SEEDS), 4, 4, 1), dtype=np.uint8)
# Convolutions of another batch size add in another order: 1e-7 a layer, amplified by up to 157 where the
# noisiest step divides by sqrt(alpha_bar).
ROUNDING = 2e-4

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "guided DDPM": ("guided", {"steps": "6", "scale": 2.0}),
    "unguided DDPM": ("guided", {"steps": "6", "scale": 0.0}),
    "guided DDIM": ("guided", {"steps": "ddim5", "scale": 2.0}),
    "guided DDIM with noise": ("guided", {"steps": "ddim5", "scale": 2.0, "eta": 0.6}),
    "sections, not clipped": ("guided", {"steps": "3,2,1", "scale": 0.5, "clip": False}),
    "class-conditional": ("conditional", {"steps": "5"}),
    "class-conditional DDIM": ("conditional", {"steps": "ddim5", "eta": 1.0}),
    "upsampler": ("upsampler", {"steps": "4"}),
}


class Recorder:
    """A denoiser that keeps the noise of every call: x_T, then z of each step."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner = inner
        self.noise: list[np.ndarray] = []
        self.calls: list[str] = []

    def run(self, graph: GraphName, feeds: Any) -> dict[str, Any]:
        if not self.noise:
            self.noise.append(feeds["x"])
        if graph == "update":
            self.noise.append(feeds["noise"])
        self.calls.append(graph)
        return self.inner.run(graph, feeds)


def draw(case: str, rows: list[int], batch_size: int) -> tuple[Samples, np.ndarray]:
    """Samples of some of the seeds, and their noise [N, 1 + steps, C, H, W]."""
    name, options = CASES[case]
    given = {
        "guided": {"labels": [LABELS[row] for row in rows]},
        "conditional": {"labels": [LABELS[row] for row in rows]},
        "upsampler": {"low_res": LOW_RES[rows]},
    }[name]
    bundle, denoiser = pipeline(name).bundle, pipeline(name).denoiser
    noise, parts = [], []
    for first in range(0, len(rows), batch_size):
        recorder = Recorder(denoiser)
        part = slice(first, first + batch_size)
        chosen = {key: value[part] for key, value in given.items()}
        seeds = [SEEDS[row] for row in rows[part]]
        parts.append(Pipeline(bundle, recorder)(seeds=seeds, **chosen, **options).x)
        noise.append(np.stack(recorder.noise, axis=1))
    whole = pipeline(name)(seeds=[SEEDS[row] for row in rows], batch_size=batch_size, **given, **options)
    np.testing.assert_array_equal(whole.x, np.concatenate(parts))  # batches do not see one another
    return whole, np.concatenate(noise)


@pytest.mark.parametrize("case", CASES)
def test_batch_size_and_order_do_not_matter(case: str) -> None:
    rows = list(range(len(SEEDS)))
    samples, noise = draw(case, rows, 16)
    assert samples.x.dtype == np.float32
    assert samples.x.shape == (len(SEEDS), 1, 8, 8)
    assert samples.x.std() > 0.1
    others = [(rows, 3), (rows[::-1], 16), ([4, 2, 9, 0, 11], 1), ([16, 8, 1], 3)]
    for order, batch_size in others:
        again, again_noise = draw(case, order, batch_size)
        np.testing.assert_array_equal(again_noise, noise[order])
        np.testing.assert_allclose(again.x, samples.x[order], atol=ROUNDING * max(1, np.abs(samples.x).max()))
        levels = again.images.astype(int) - samples.images[order].astype(int)
        assert np.abs(levels).max() <= 1
        assert again.seeds == tuple(SEEDS[row] for row in order)


def test_the_same_request_gives_the_same_bits() -> None:
    first, second = (pipeline("guided")([0, 1, 2], [5, 6, 7]).x for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "sampler", [SamplerConfig(steps="4", scale=3.0), SamplerConfig(method="ddim", steps="4", scale=3.0)]
)
def test_it_is_what_the_papers_formulas_say(sampler: SamplerConfig) -> None:
    """A whole guided trajectory against PyTorch's networks and Algorithms 1 and 2, with the same noise."""
    import torch

    from admtrt.models.classifier import log_prob_gradient

    recorder = Recorder(pipeline("guided").denoiser)
    labels = [2, 0, 1]
    options = {"steps": sampler.steps, "method": sampler.method, "scale": sampler.scale}
    found = Pipeline(pipeline("guided").bundle, recorder)(labels, [1, 2, 3], **options).x
    diffusion = Diffusion(DiffusionConfig(), process_from_config(DiffusionConfig(), sampler.steps))
    unet, classifier = network(UNET).module, network(CLASSIFIER).module
    x, *noise = (torch.from_numpy(array) for array in recorder.noise)
    for index, z in zip(reversed(range(4)), noise, strict=True):
        step = torch.full((3,), index)
        t = diffusion.model_t(step)
        gradient = log_prob_gradient(classifier, x, t, torch.tensor(labels))  # type: ignore[arg-type]
        x, _ = sample_step(diffusion, unet(x, t), x, step, z, gradient, sampler)
    np.testing.assert_allclose(found, x.numpy(), atol=ROUNDING)


# --- every option changes the result --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"steps": "6"}),
        ({}, {"steps": "3,2"}),
        ({}, {"steps": "ddim5"}),
        ({}, {"method": "ddim"}),
        ({}, {"scale": 1.0}),
        ({}, {"scale": -2.0}),
        ({}, {"scale": 0.0}),
        ({}, {"clip": False}),
        ({}, {"labels": [1, 2, 0]}),
        ({}, {"seeds": [3, 4, 5]}),
        ({"method": "ddim"}, {"eta": 0.5}),
        ({"method": "ddim", "eta": 0.5}, {"eta": 1.0}),
        ({"method": "ddim", "steps": "5"}, {"steps": "ddim5"}),
    ],
)
def test_every_option_changes_every_sample(base: dict[str, Any], change: dict[str, Any]) -> None:
    # Single pixels may be bounded to the same value on both sides; no whole image is.
    request = {"labels": [0, 1, 2], "seeds": [0, 1, 2]} | base
    before, after = (pipeline("guided")(**options).x for options in (request, request | change))
    assert (np.abs(before - after).reshape(3, -1).max(axis=1) > 10 * ROUNDING).all()


def test_labels_reach_a_class_conditional_unet() -> None:
    x = pipeline("conditional")([0, 1, 2, 3], [0, 0, 0, 0]).x
    for index in range(1, 4):
        assert np.abs(x[index] - x[0]).max() > 10 * ROUNDING


def test_the_conditioning_reaches_an_upsampler() -> None:
    x = pipeline("upsampler")(seeds=[0, 0], low_res=LOW_RES[:2], steps="3").x
    assert np.abs(x[0] - x[1]).max() > 10 * ROUNDING


def test_small_images_may_be_given_as_levels_or_as_numbers() -> None:
    numbers = LOW_RES[:2].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    assert numbers.min() >= -1
    from_levels, from_numbers = (
        pipeline("upsampler")(low_res=given, steps="3").x for given in (LOW_RES[:2], numbers)
    )
    np.testing.assert_array_equal(from_levels, from_numbers)


# --- what is left out -----------------------------------------------------------------------------------


def test_what_is_left_out_is_the_bundles_recommendation() -> None:
    given = {"steps": SAMPLER.steps, "method": SAMPLER.method, "scale": SAMPLER.scale, "clip": True}
    left_out, explicit = (pipeline("guided")([0, 1, 2], **options).x for options in ({}, given))
    np.testing.assert_array_equal(left_out, explicit)


def test_seeds_count_from_0() -> None:
    samples = pipeline("guided")([0, 1])
    assert samples.seeds == (0, 1)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1]
    assert samples.labels.dtype == np.int64
    np.testing.assert_array_equal(samples.x, pipeline("guided")([0, 1], [0, 1]).x)


def test_one_sample_where_nothing_says_how_many() -> None:
    samples = pipeline("guided")(scale=0.0)
    assert samples.x.shape == (1, 1, 8, 8)
    assert samples.labels is None
    assert samples.images.shape == (1, 8, 8, 1)
    assert samples.images.dtype == np.uint8


def test_the_number_of_samples_may_come_from_anything() -> None:
    assert len(pipeline("guided")(seeds=[1, 2, 3], scale=0.0).x) == 3
    assert len(pipeline("upsampler")(low_res=LOW_RES[:2], steps="2").x) == 2


def test_a_bundle_without_a_classifier_is_not_guided() -> None:
    assert pipeline("conditional").sampler().scale == 0.0


def test_a_respacing_implies_its_method_unless_told_otherwise() -> None:
    chosen = pipeline("guided").sampler
    assert chosen(steps="ddim25").method == "ddim"
    assert chosen(steps="25").method == "ddpm"
    assert chosen(steps="ddim25", method="ddpm").method == "ddpm"
    assert chosen(steps="25", method="ddim", eta=0.5).eta == 0.5


def test_the_public_name() -> None:
    samples = PublicPipeline.from_bundle(str(exported_bundle("guided")))(
        labels=[0, 1], seeds=[3, 4], steps="ddim5", scale=1.5
    )
    np.testing.assert_allclose(
        samples.x, pipeline("guided")([0, 1], [3, 4], steps="ddim5", scale=1.5).x, atol=ROUNDING
    )


# --- what is computed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "gradients", "noises"),
    [
        ({}, 5, 4),
        ({"scale": 0.0}, 0, 4),
        ({"method": "ddim"}, 5, 0),
        ({"method": "ddim", "scale": 0.0}, 0, 0),
    ],
)
def test_nothing_is_computed_in_vain(options: dict[str, Any], gradients: int, noises: int) -> None:
    recorder = Recorder(pipeline("guided").denoiser)
    Pipeline(pipeline("guided").bundle, recorder)([0, 1, 2], **options)
    assert recorder.calls.count("unet") == recorder.calls.count("update") == 5
    assert recorder.calls.count("classifier_gradient") == gradients
    assert sum(bool(z.any()) for z in recorder.noise[1:]) == noises


def test_a_callback_sees_every_step_of_every_batch() -> None:
    seen: list[Step] = []
    copies: list[tuple[np.ndarray, np.ndarray]] = []

    def look(step: Step) -> None:
        seen.append(step)
        copies.append((step.x.copy(), step.x_0.copy()))

    samples = pipeline("guided")([0, 1, 2, 0, 1], batch_size=2, callback=look)
    assert [(step.first, step.index) for step in seen] == [
        (first, index) for first in (0, 2, 4) for index in range(1, 6)
    ]
    assert {step.total for step in seen} == {5}
    timesteps = sampling_schedule(DiffusionConfig(), SAMPLER).timesteps.tolist()
    assert [step.timestep for step in seen[:5]] == timesteps == [999, 749, 500, 250, 0]
    for step, (x, x_0) in zip(seen, copies, strict=True):  # what was kept is not written over later
        np.testing.assert_array_equal(step.x, x)
        np.testing.assert_array_equal(step.x_0, x_0)
        assert step.x.shape == step.x_0.shape == (1 if step.first == 4 else 2, 1, 8, 8)
        assert np.abs(step.x_0).max() <= 1  # clipped, and DDPM does not shift it
    np.testing.assert_array_equal(np.concatenate([step.x for step in seen if step.index == 5]), samples.x)
    # The last step returns x_0 itself, moved by the gradient.
    assert np.abs(seen[4].x - seen[4].x_0).max() < 0.1


def test_an_error_in_a_callback_ends_the_sampling() -> None:
    calls = []

    def fail(step: Step) -> None:
        calls.append(step.index)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pipeline("guided")([0], callback=fail)
    assert calls == [1]


# --- slots: samples that are joined and parted at will --------------------------------------------------

MIXTURE = [
    (SamplerConfig(steps="6", scale=2.0), 0, 1),
    (SamplerConfig(steps="6", scale=2.0), 1, 4),
    (SamplerConfig(steps="9", scale=0.0), 2, 0),
    (SamplerConfig(method="ddim", steps="ddim8", scale=3.0), 0, 3),
    (SamplerConfig(method="ddim", steps="7", scale=1.0, eta=0.8), 1, 2),
    (SamplerConfig(method="ddim", steps="2,2,2", scale=0.0), 2, 2),
    (SamplerConfig(steps="5", scale=-1.0, clip=False), 1, 0),
]


def alone(row: int) -> Slots:
    sampler, label, _ = MIXTURE[row]
    schedule = sampling_schedule(DiffusionConfig(), sampler)
    guided = bool(sampler.scale)
    return slots_for(UNET, CLASSIFIER, [schedule], [100 + row], labels=np.array([label]), guided=guided)


def test_slots_at_different_places_equal_each_alone() -> None:
    """Schedules, positions, methods, scales and clipping differ in one batch; every row ends as by itself."""
    denoiser = pipeline("guided").denoiser
    expected = []
    for row in range(len(MIXTURE)):
        slots = alone(row)
        assert len(slots) == 1
        for _ in range(len(slots.schedules[0])):
            assert not slots.finished.any()
            advance(slots, denoiser)
        assert slots.finished.all()
        expected.append((slots.x[0], slots.x_0[0]))

    started = [alone(row) for row in range(len(MIXTURE))]
    for (_, _, ahead), slots in zip(MIXTURE, started, strict=True):
        for _ in range(ahead):
            advance(slots, denoiser)
    batch = Slots.join(started)
    done: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    while len(batch):
        advance(batch, denoiser)
        for index in np.flatnonzero(batch.finished):
            done[batch.seeds[index] - 100] = (batch.x[index], batch.x_0[index])
        batch = batch.take(~batch.finished)
    assert sorted(done) == list(range(len(MIXTURE)))
    for row, (x, x_0) in enumerate(expected):
        bound = ROUNDING * max(1.0, float(np.abs(x).max()))
        np.testing.assert_allclose(done[row][0], x, atol=bound, err_msg=str(MIXTURE[row]))
        np.testing.assert_allclose(done[row][1], x_0, atol=bound, err_msg=str(MIXTURE[row]))


def test_an_unguided_slot_is_not_moved_by_a_guided_neighbour() -> None:
    """Its gradient is not computed, with any label."""
    denoiser = pipeline("guided").denoiser
    ends = []
    for label in (0, 2):
        batch = Slots.join([alone(0), alone(2)])
        assert batch.conditions["classifier_gradient"]["y"].tolist() == [0, 0]
        batch.conditions["classifier_gradient"]["y"][1] = label
        for _ in range(6):
            advance(batch, denoiser)
        ends.append(batch.x[1])
    np.testing.assert_array_equal(*ends)
