"""Samples in flight: making, splitting and joining them, and the rows whose gradient a step computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bundles import CLASSIFIER, SAMPLER, UNET, pipeline

from admtrt.config import DiffusionConfig
from admtrt.contract import CLASSIFIER_GRADIENT
from admtrt.runtime.noise import initial_noise
from admtrt.runtime.sampler import advance, hold
from admtrt.runtime.slots import Slots, slots_for
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import sampling_schedule

GUIDED = sampling_schedule(DiffusionConfig(), SAMPLER)
PLAIN = sampling_schedule(DiffusionConfig(), SamplerConfig(steps="6", scale=0.0))
UPSAMPLER = UNET.model_copy(update={"low_res_size": 4, "num_classes": 5})
LOW_RES = np.random.default_rng(0).uniform(-1, 1, (2, 1, 4, 4)).astype(np.float32)
SHAPE = (1, 8, 8)


def guided(*seeds: int) -> Slots:
    labels = np.array([seed % 3 for seed in seeds])
    return slots_for(UNET, CLASSIFIER, [GUIDED] * len(seeds), seeds, labels=labels, guided=True)


def plain(*seeds: int) -> Slots:
    return slots_for(UNET, CLASSIFIER, [PLAIN] * len(seeds), seeds, guided=False)


class Watched:
    """The exported graphs; records the inputs of the gradient."""

    def __init__(self) -> None:
        self.inner = pipeline("guided").denoiser
        self.asked: list[Any] = []

    def run(self, graph: Any, feeds: Any) -> Any:
        if graph == CLASSIFIER_GRADIENT:
            self.asked.append(feeds)
        return self.inner.run(graph, feeds)


# --- made ------------------------------------------------------------------------------------------------


def test_each_network_is_given_what_it_takes() -> None:
    labels = np.array([3, 4])
    slots = slots_for(UPSAMPLER, None, [PLAIN] * 2, [1, 2], labels=labels, low_res=LOW_RES, guided=False)
    assert slots.conditions.keys() == {"unet"}
    np.testing.assert_array_equal(slots.conditions["unet"]["y"], labels)
    np.testing.assert_array_equal(slots.conditions["unet"]["low_res"], LOW_RES)
    assert slots.stage == 4
    np.testing.assert_array_equal(slots.x, initial_noise([1, 2], SHAPE, stage=4))
    assert guided(1, 2).conditions["unet"] == {}
    assert guided(1, 2).conditions[CLASSIFIER_GRADIENT]["y"].tolist() == [1, 2]
    assert plain(1, 2).conditions == {"unet": {}}


def test_latents_take_the_place_of_drawn_noise() -> None:
    latents = np.full((2, *SHAPE), 0.5, np.float32)
    slots = slots_for(UNET, None, [PLAIN] * 2, [1, 2], guided=False, latents=latents)
    np.testing.assert_array_equal(slots.x, latents)
    for wrong in (latents[:1], latents.astype(np.float64), latents[:, :, :4]):
        with pytest.raises(ValueError, match=r"expected float32 \(2, 1, 8, 8\)"):
            slots_for(UNET, None, [PLAIN] * 2, [1, 2], guided=False, latents=wrong)


@pytest.mark.parametrize(
    ("networks", "given", "message"),
    [
        ((UPSAMPLER, None), {"labels": np.array([0, 1]), "guided": False}, "'unet' takes 'low_res'"),
        ((UPSAMPLER, None), {"low_res": LOW_RES, "guided": False}, "'unet' takes 'y'"),
        ((UNET, CLASSIFIER), {"guided": True}, "'classifier_gradient' takes 'y'"),
        ((UNET, None), {"labels": np.array([0, 1]), "guided": True}, "without a classifier"),
    ],
)
def test_what_is_missing_is_named(networks: Any, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slots_for(*networks, [PLAIN] * 2, [1, 2], **given)


# --- taken apart, joined, replaced -----------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[2, 0], np.array([2, 0]), np.array([True, False, True])])
def test_taken_rows_carry_everything_and_are_copies(rows: Any) -> None:
    slots = guided(4, 5, 6)
    slots.position[:] = [1, 2, 3]
    slots.x_0 = slots.x + 1
    chosen = np.arange(3)[rows].tolist()
    taken = slots.take(rows)
    assert taken.seeds == [slots.seeds[row] for row in chosen]
    assert taken.position.tolist() == [row + 1 for row in chosen]
    np.testing.assert_array_equal(taken.x, slots.x[chosen])
    np.testing.assert_array_equal(taken.x_0, slots.x_0[chosen])
    assert taken.conditions[CLASSIFIER_GRADIENT]["y"].tolist() == [(row + 4) % 3 for row in chosen]
    before = guided(4, 5, 6)
    taken.x[:] = taken.position[:] = taken.conditions[CLASSIFIER_GRADIENT]["y"][:] = -1
    np.testing.assert_array_equal(slots.x, before.x)
    assert slots.position.tolist() == [1, 2, 3]
    assert slots.conditions[CLASSIFIER_GRADIENT]["y"].tolist() == [1, 2, 0]


def test_no_row_at_all() -> None:
    assert len(guided(1, 2).take([])) == 0


def test_joined_parts_are_rows_in_order() -> None:
    parts = [guided(4, 5), plain(6)]
    parts[1].x_0 += 1
    slots = Slots.join(parts)
    assert slots.seeds == [4, 5, 6]
    assert slots.schedules == [GUIDED, GUIDED, PLAIN]
    np.testing.assert_array_equal(slots.x, np.concatenate([part.x for part in parts]))
    np.testing.assert_array_equal(slots.x_0, np.concatenate([part.x_0 for part in parts]))
    assert slots.conditions[CLASSIFIER_GRADIENT]["y"].tolist() == [1, 2, 0]
    assert slots.conditions[CLASSIFIER_GRADIENT]["y"].dtype == np.int64
    for row, part in ((0, parts[0].take([0])), (2, parts[1])):
        again = slots.take([row])
        np.testing.assert_array_equal(again.x, part.x)
        assert (again.seeds, again.schedules) == (part.seeds, part.schedules)


def test_parts_that_do_not_go_together() -> None:
    upsampled = slots_for(
        UPSAMPLER, None, [PLAIN], [1], labels=np.array([0]), low_res=LOW_RES[:1], guided=False
    )
    small = slots_for(UNET.model_copy(update={"image_size": 4}), None, [PLAIN], [1], guided=False)
    labelled = slots_for(
        UNET.model_copy(update={"num_classes": 3}), None, [PLAIN], [1], labels=np.array([0]), guided=False
    )
    unlabelled = guided(1)
    del unlabelled.conditions[CLASSIFIER_GRADIENT]
    for parts, message in (
        ([], "no slots"),
        ([plain(1), upsampled], r"stages \[0, 4\]"),
        ([plain(1), small], "'x' of slots differs"),
        ([plain(1), labelled], "different inputs"),
        ([guided(1), unlabelled], "no conditions of 'classifier_gradient'"),
    ):
        with pytest.raises(ValueError, match=message):
            Slots.join(parts)


def test_other_samples_take_the_place_of_rows() -> None:
    slots = plain(1, 2, 3)
    slots.x_0 += 1
    other = guided(8, 7)
    slots.replace([2, 0], other)
    assert slots.seeds == [7, 2, 8]
    np.testing.assert_array_equal(slots.x, np.concatenate([other.x[1:], plain(2).x, other.x[:1]]))
    assert slots.x_0.reshape(3, -1).mean(axis=1).tolist() == [0, 1, 0]
    assert slots.conditions[CLASSIFIER_GRADIENT]["y"].tolist() == [1, 0, 2]
    for rows in ([0], [0, 0], [0, -3], [0, 1, 2]):
        with pytest.raises(ValueError, match="cannot take the place"):
            slots.replace(rows, other)


# --- the gradient of guided rows alone -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "size"),
    [
        ("gpp", 1),
        ("pgpg", 2),
        ("gpggp", 4),
        ("ggpggpgg", 8),
        ("gggp", 4),
        ("ggpgpgg", 7),  # never above the batch
        ("ggg", 3),  # not gathered
        ("pp", 0),
    ],
)
def test_only_guided_rows_pay_for_the_gradient(kinds: str, size: int) -> None:
    slots = Slots.join([guided(row) if kind == "g" else plain(row) for row, kind in enumerate(kinds)])
    rows = [row for row, kind in enumerate(kinds) if kind == "g"]
    expected = slots.take(range(len(slots)))
    watched = Watched()
    advance(slots, watched)
    assert [len(feeds["x"]) for feeds in watched.asked] == ([size] if size else [])
    if size:
        padded = rows + [rows[-1]] * (size - len(rows))
        np.testing.assert_array_equal(watched.asked[0]["x"], expected.x[padded])
        assert watched.asked[0]["y"].tolist() == [row % 3 for row in padded]
    # The update uses the networks' outputs row by row: each row equals that of a batch of the same row.
    for row in range(len(kinds)):
        alone = expected.take([row] * len(kinds))
        advance(alone, pipeline("guided").denoiser)
        np.testing.assert_allclose(slots.x[row], alone.x[0], rtol=0, atol=2e-5)  # sizes choose ORT's kernels


def test_a_replaced_row_is_that_sample_alone_at_the_same_batch_size() -> None:
    denoiser = pipeline("guided").denoiser
    alone = guided(9, 9, 9)
    for _ in range(3):
        advance(alone, denoiser)
    slots = guided(1, 2, 3)
    with hold(slots, denoiser) as held:
        held.advance()
        held.advance()
        held.replace([1], guided(9))
        for _ in range(3):
            held.advance()
        held.read()
    np.testing.assert_array_equal(slots.x[1], alone.x[1])
    np.testing.assert_array_equal(slots.x_0[1], alone.x_0[1])
