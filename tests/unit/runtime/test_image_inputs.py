"""Images as a start and as a constraint, from Python: their effect on samples, and refusals."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import UNET, pipeline, sham_bundle

from admtrt import Known, Latents
from admtrt.bundle import Bundle
from admtrt.config import DiffusionConfig
from admtrt.errors import OutputError, RequestError
from admtrt.images import to_uint8
from admtrt.runtime.bulk import BulkRequest, draw
from admtrt.runtime.images_in import as_states
from admtrt.runtime.latents import slerp
from admtrt.runtime.noise import initial_noise
from admtrt.runtime.pipeline import Pipeline
from admtrt.schedule.process import process_from_config
from admtrt.schedule.sampler import SamplerConfig

RNG = np.random.default_rng(3)
IMAGES = RNG.integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
STATES = as_states(IMAGES)
MASK = np.zeros((8, 8), bool)
MASK[:, :4] = True
LABELS = [0, 1, 2]


def drawn(**request: Any) -> np.ndarray:
    x: np.ndarray = pipeline("guided")(LABELS, [4, 5, 6], **{"steps": "6", "scale": 1.0} | request).x
    return x


def refusal(**request: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        pipeline("guided")(LABELS, **{"steps": "6"} | request)
    assert caught.value.exit_code == 2
    return caught.value


# --- what they do ----------------------------------------------------------------------------------------


def test_uint8_comes_back_as_it_was() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(to_uint8(as_states(levels)), levels)
    assert np.abs(as_states(levels)).max() <= 1 + 1e-6


@pytest.mark.parametrize(
    "sampler",
    [
        {"steps": "20"},
        {"steps": "ddim20"},
        {"method": "dpmpp", "steps": "8", "order": 3},
        {"method": "dpmpp", "steps": "8", "form": "single", "order": 2},
        {"method": "dpmpp", "steps": "8", "sde": True, "order": 2},
        {"method": "unipc", "steps": "8"},
        {"method": "euler", "steps": "8"},
        {"method": "heun", "steps": "9", "churn": (10.0, 0.0, 50.0, 1.0)},
    ],
    ids=str,
)
def test_the_weaker_the_nearer_to_the_image(sampler: dict[str, Any]) -> None:
    distances = [
        np.abs(drawn(init=IMAGES, strength=strength, **sampler) - STATES).mean() for strength in (0.15, 1.0)
    ]
    assert distances[0] < 0.75 * distances[1]


def test_a_start_takes_the_last_evaluations() -> None:
    seen: list[int] = []
    drawn(init=IMAGES, strength=0.29, steps="100", callback=lambda step: seen.append(step.total))
    assert set(seen) == {29}  # int(0.29 * 100) is 28


def test_known_pixels_are_those_of_the_image() -> None:
    known = Known(IMAGES, MASK)
    plain, kept = drawn(), drawn(known=known)
    np.testing.assert_array_equal(to_uint8(kept)[:, MASK], IMAGES[:, MASK])
    assert np.abs(kept - plain)[..., ~MASK].max() > 1e-3
    assert np.abs(drawn(known=known, jump=(2, 2)) - kept)[..., ~MASK].max() > 1e-3
    as_sampled = drawn(known=Known(IMAGES, MASK, as_sampled=True))
    np.testing.assert_allclose(as_sampled[..., ~MASK], kept[..., ~MASK], rtol=0, atol=1e-6)
    assert np.abs(as_sampled - STATES)[..., MASK].max() > 1e-3
    started = drawn(known=known, init=IMAGES, strength=0.5, jump=(1, 2))
    np.testing.assert_array_equal(to_uint8(started)[:, MASK], IMAGES[:, MASK])


def test_a_reference_gives_its_low_frequencies() -> None:
    def coarse(x: np.ndarray) -> np.ndarray:
        return x.reshape(3, 1, 2, 4, 2, 4).mean(axis=(3, 5))

    free = np.abs(coarse(drawn(steps="20")) - coarse(STATES)).mean()
    held = np.abs(coarse(drawn(steps="20", reference=IMAGES, low_pass=2)) - coarse(STATES)).mean()
    assert held < 0.5 * free
    late = drawn(steps="20", reference=IMAGES, low_pass=(2, 10))
    assert np.abs(coarse(late) - coarse(STATES)).mean() > held


@pytest.mark.parametrize(
    "given",
    [
        {"init": IMAGES, "strength": 0.5},
        {"known": Known(IMAGES, MASK), "jump": (2, 2)},
        {"known": Known(IMAGES, np.stack([MASK, ~MASK, MASK.T])[:, None])},
        {"reference": IMAGES, "low_pass": 4},
        {"latents": initial_noise([9, 10, 11], (1, 8, 8))},
    ],
    ids=lambda given: next(iter(given)),
)
def test_batches_divide_the_work_only(given: dict[str, Any]) -> None:
    whole = drawn(**given)
    np.testing.assert_allclose(drawn(batch_size=2, **given), whole, rtol=0, atol=2e-5)
    alone = pipeline("guided")(
        [1], [5], steps="6", scale=1.0, **{name: row(one) for name, one in given.items()}
    )
    np.testing.assert_allclose(alone.x[0], whole[1], rtol=0, atol=2e-5)


def row(one: Any) -> Any:
    """The second sample's part of an input."""
    if isinstance(one, Known):
        mask = np.asarray(one.mask)
        return Known(one.images[1:2], mask if mask.ndim == 2 else mask[1:2])
    return one[1:2] if isinstance(one, np.ndarray) else one


def test_one_image_serves_all() -> None:
    for name, more in (("init", {"strength": 0.5}), ("reference", {"low_pass": 4})):
        one = drawn(**{name: IMAGES[:1]}, **more)
        np.testing.assert_allclose(one, drawn(**{name: IMAGES[[0, 0, 0]]}, **more), rtol=0, atol=1e-6)
    assert len(pipeline("guided")([0], init=IMAGES[:1], strength=0.5, steps="6").x) == 1


def test_floats_and_uint8_are_the_same_images() -> None:
    for name, more in (("init", {"strength": 0.5}), ("reference", {"low_pass": 4})):
        np.testing.assert_array_equal(drawn(**{name: IMAGES}, **more), drawn(**{name: STATES}, **more))


def test_upsamplers_start_at_images_too(tmp_path: Path) -> None:
    unet = UNET.model_copy(update={"low_res_size": 4})
    bundle = sham_bundle(tmp_path / "bundle", network=unet, classifier=None, class_names=())
    given = {"low_res": IMAGES[:, ::2, ::2], "init": IMAGES, "strength": 0.3, "known": Known(IMAGES, MASK)}
    images = Pipeline(bundle, Gaussian())(steps="10", **given).images
    np.testing.assert_array_equal(images[:, MASK], IMAGES[:, MASK])
    assert (images[:, ~MASK] != IMAGES[:, ~MASK]).any()


# --- inversion -------------------------------------------------------------------------------------------


class Gaussian:
    """The graphs with an exact network for data of the standard deviation 0.5, whose ways are smooth."""

    def __init__(self) -> None:
        self.labels: list[Any] = []
        self.alpha_bar = process_from_config(DiffusionConfig()).alpha_bar

    def run(self, graph: Any, feeds: Any) -> Any:
        if graph != "unet":
            return pipeline("guided").denoiser.run(graph, feeds)
        self.labels.append(feeds.get("y"))
        a = self.alpha_bar[feeds["t"].astype(int)].reshape(-1, 1, 1, 1)
        eps = np.sqrt(1 - a) * feeds["x"] / (0.25 * a + 1 - a)
        return {"out": np.concatenate([eps, 0 * eps], axis=1).astype(np.float32)}


def test_inversion_and_back() -> None:
    exact = Pipeline(pipeline("guided").bundle, Gaussian())
    errors = []
    for steps in ("ddim20", "ddim200"):
        latents = exact.invert(IMAGES, LABELS, steps=steps, batch_size=2)
        assert (latents.levels, latents.steps, latents.clip) == (int(steps[4:]) - 1, steps, False)
        assert latents.labels.tolist() == LABELS
        back = exact(LABELS, latents=latents, scale=0.0).x
        errors.append(float(np.abs(back - STATES).mean()))
    # An error of first order in the step: measured 0.062 and 0.0047.
    assert errors[1] < 0.02
    assert errors[1] < 0.2 * errors[0]


def test_latents_enter_where_they_left() -> None:
    latents = pipeline("guided").invert(IMAGES, LABELS, steps="ddim20", levels=7)
    seen: list[int] = []
    unguided = pipeline("guided")(
        LABELS, latents=latents, scale=0.0, callback=lambda step: seen.append(step.total)
    ).x
    assert set(seen) == {8}
    guided = pipeline("guided")(LABELS, latents=latents, scale=5.0).x
    assert np.abs(guided - unguided).max() > 1e-3
    assert np.abs(unguided - STATES).mean() < 0.2
    with pytest.raises(RequestError, match="inverted over steps 'ddim20', and steps 'ddim25' have other"):
        pipeline("guided")(LABELS, latents=latents, steps="ddim25")
    with pytest.raises(RequestError, match="latents of an inversion go with ddim and ddpm, not with unipc"):
        pipeline("guided")(LABELS, latents=latents, method="unipc", steps="8")
    false = Latents(latents.x, levels=20, steps="ddim20", clip=False)
    with pytest.raises(RequestError, match="say that they are 20 levels up; steps 'ddim20' have 19"):
        pipeline("guided")(LABELS, latents=false)


def test_a_conditional_network_is_inverted_with_its_labels(tmp_path: Path) -> None:
    unet = UNET.model_copy(update={"num_classes": 3})
    bundle = sham_bundle(tmp_path / "bundle", network=unet, classifier=None)
    denoiser = Gaussian()
    Pipeline(bundle, denoiser).invert(IMAGES, [2, "bee", 0], steps="ddim10", levels=1)
    assert denoiser.labels[0].tolist() == [2, 1, 0]
    with pytest.raises(RequestError, match="labels are needed"):
        Pipeline(bundle, denoiser).invert(IMAGES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"levels": 20}, "20 levels of noise are out of range; steps 'ddim20' have 19"),
        ({"levels": 2.5}, "levels is 2.5; expected a whole number"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"labels": [0, 1]}, "2 labels for 3 images"),
        ({"images": IMAGES[:, :4]}, "images is uint8 [N, 4, 8, 1]"),
    ],
)
def test_inversions_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        pipeline("guided").invert(**{"images": IMAGES, "steps": "ddim20"} | given)
    assert message in caught.value.message


def test_upsamplers_are_not_inverted(tmp_path: Path) -> None:
    unet = UNET.model_copy(update={"low_res_size": 4})
    bundle = sham_bundle(tmp_path / "bundle", network=unet, classifier=None, class_names=())
    with pytest.raises(RequestError, match="is an upsampler, whose images are not inverted"):
        Pipeline(bundle, Gaussian()).invert(IMAGES)


# --- between two -----------------------------------------------------------------------------------------


def test_slerp_stays_on_the_sphere() -> None:
    a, b = initial_noise([1, 2], (1, 8, 8))
    way = slerp(a, b, 5)
    np.testing.assert_allclose(way[[0, -1]], [a, b], rtol=0, atol=1e-6)
    norms = np.linalg.norm(way.reshape(5, -1), axis=1)
    assert (norms >= min(norms[0], norms[-1]) * 0.999).all()
    a, b = (one / np.linalg.norm(one) for one in (a, b))
    cosines = [(one * two).sum() for one, two in pairwise(slerp(a, b, 5).astype(np.float64))]
    np.testing.assert_allclose(cosines, cosines[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 1.0 + 1e-6, -1.0, 0.0])
def test_slerp_of_states_without_an_angle_is_a_straight_line(factor: float) -> None:
    (a,) = initial_noise([1], (1, 8, 8))
    way = slerp(a, (a * np.float32(factor)), 3)
    assert np.isfinite(way).all()
    np.testing.assert_allclose(way[1], (1 + factor) / 2 * a, rtol=0, atol=1e-6)


def test_latents_of_seeds_are_where_they_begin() -> None:
    given = pipeline("guided")
    latents = Latents.of_seeds([7, 2, 3], given.bundle.manifest.network)
    expected = given(LABELS, [7, 2, 3], method="ddim", steps="4").x
    np.testing.assert_array_equal(given(LABELS, latents=latents, method="ddim", steps="4").x, expected)
    with pytest.raises(RequestError, match="seed"):
        Latents.of_seeds([-1], given.bundle.manifest.network)


def test_between_latents() -> None:
    latents = Latents(initial_noise([1, 2, 3], (1, 8, 8)), labels=np.array([4, 4, 5]))
    assert latents.between(0, 1, 4).labels.tolist() == [4] * 4
    assert latents.between(0, 2, 4).labels is None
    np.testing.assert_allclose(latents.between(2, 0, 2).x, latents.x[[2, 0]], rtol=0, atol=1e-6)
    for first, second, count, message in (
        (0, 3, 4, "there are no latents 3; there are 3, counted from 0"),
        (-1, 0, 4, "there are no latents -1"),
        (0, 1, 1, "1 samples on the way between two; expected at least 2"),
    ):
        with pytest.raises(RequestError, match=message):
            latents.between(first, second, count)


# --- in bulk ---------------------------------------------------------------------------------------------

SAMPLER = SamplerConfig(steps="6", scale=1.0)


def bulk(**inputs: Any) -> BulkRequest:
    from admtrt.runtime.image_inputs import ImageInputs

    return BulkRequest(3, np.array(LABELS), 4, SAMPLER, 2, 2, inputs=ImageInputs(**inputs))


def test_images_are_a_part_of_a_run(tmp_path: Path) -> None:
    given = {"init": IMAGES, "strength": 0.5}
    made = draw(pipeline("guided"), bulk(**given), tmp_path / "run", ["npz"])
    with np.load(made[0]) as archive:
        drawn_in_bulk = archive["arr_0"]
    assert np.abs(drawn_in_bulk.astype(int) - to_uint8(drawn(**given))).max() <= 1
    (tmp_path / "run" / "shards" / "00000002.npz").unlink()
    draw(pipeline("guided"), bulk(**given), tmp_path / "run", ["npz"])
    for changed, differing in (
        ({}, "init differs, strength is 0.5 there and None now"),
        ({"init": IMAGES, "strength": 0.6}, "strength is 0.5 there and 0.6 now"),
        ({"init": IMAGES[::-1], "strength": 0.5}, "init differs"),
        (given | {"known": Known(IMAGES, MASK)}, "known differs, mask differs"),
    ):
        with pytest.raises(OutputError) as caught:
            draw(pipeline("guided"), bulk(**changed), tmp_path / "run", ["npz"])
        assert differing in caught.value.message


def test_a_run_begun_before_there_were_images_goes_on(tmp_path: Path) -> None:
    draw(pipeline("guided"), bulk(), tmp_path / "run", ["npz"])
    text = (tmp_path / "run" / "request.json").read_text()
    assert not any(name in text for name in ("init", "known", "order", "jump"))


def test_options_of_solvers_are_a_part_of_a_run(tmp_path: Path) -> None:
    def request(**options: Any) -> BulkRequest:
        sampler = SamplerConfig(method="dpmpp", steps="4", scale=0.0, **options)
        return BulkRequest(1, np.array([0]), 4, sampler, 2, 2)

    draw(pipeline("guided"), request(order=3), tmp_path / "three", ["npz"])
    draw(pipeline("guided"), request(), tmp_path / "two", ["npz"])
    with pytest.raises(OutputError, match="order is 3 there and None now"):
        draw(pipeline("guided"), request(), tmp_path / "three", ["npz"])
    with pytest.raises(OutputError, match="order is None there and 3 now"):
        draw(pipeline("guided"), request(order=3), tmp_path / "two", ["npz"])


# --- what is refused -------------------------------------------------------------------------------------

FLOAT = np.zeros((3, 1, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"init": IMAGES}, "init and strength belong together; there is no strength"),
        ({"strength": 0.5}, "init and strength belong together; there is no init"),
        *[
            ({"init": IMAGES, "strength": strength}, "expected a number above 0, up to 1")
            for strength in (0, -0.1, 1.01, float("nan"), float("inf"), True, "0.5", [0.5])
        ],
        ({"init": IMAGES, "strength": 0.05}, "strength 0.05 of 6 evaluations is none"),
        ({"init": IMAGES[:2], "strength": 0.5}, "2 init for 3 samples"),
        ({"init": IMAGES[:0], "strength": 0.5}, "init holds no image"),
        ({"init": IMAGES[:, :4], "strength": 0.5}, "init is uint8 [N, 4, 8, 1]; expected uint8 [N, 8, 8, 1]"),
        ({"init": IMAGES.repeat(3, 3), "strength": 0.5}, "init is uint8 [N, 8, 8, 3]"),
        ({"init": FLOAT.astype(np.float64), "strength": 0.5}, "init is float64"),
        ({"init": "photo.png", "strength": 0.5}, "init is <U9 []"),
        ({"init": FLOAT + 1.01, "strength": 0.5}, "values from 1.01 to 1.01; expected -1 to 1"),
        ({"init": FLOAT + np.float32("nan"), "strength": 0.5}, "values from nan to nan"),
        ({"known": Known(IMAGES, MASK[:4])}, "the mask is bool [4, 8]; expected [8, 8]"),
        ({"known": Known(IMAGES, MASK[None, None, None])}, "the mask is bool [1, 1, 1, 8, 8]"),
        ({"known": Known(IMAGES, np.stack([MASK] * 2))}, "2 masks for 3 samples"),
        ({"known": Known(IMAGES, MASK * 255)}, "with values other than 0 and 1"),
        ({"known": Known(IMAGES, MASK * 0.5)}, "with values other than 0 and 1"),
        ({"known": Known(IMAGES, np.where(MASK, np.nan, 1))}, "with values other than 0 and 1"),
        ({"known": Known(IMAGES, MASK.astype(str))}, "with values other than 0 and 1"),
        ({"known": Known(IMAGES, MASK | True)}, "the mask knows every pixel"),
        ({"known": Known(IMAGES, MASK & False)}, "the mask knows no pixel"),
        ({"known": Known(IMAGES, np.stack([MASK, MASK, MASK & False]))}, "mask 2 knows no pixel"),
        ({"known": Known(IMAGES[:, :, :4], MASK)}, "known is uint8 [N, 8, 4, 1]"),
        ({"jump": (2, 2)}, "a jump resamples around known pixels, and there are none"),
        ({"known": Known(IMAGES, MASK), "jump": (6, 2)}, "jumps of 6 steps do not fit in 6 evaluations"),
        ({"known": Known(IMAGES, MASK), "jump": (2, 1)}, "jump is 2:1"),
        ({"known": Known(IMAGES, MASK), "jump": (0, 2)}, "jump is 0:2"),
        ({"known": Known(IMAGES, MASK), "jump": 2}, "jump is 2; expected two numbers"),
        ({"known": Known(IMAGES, MASK), "jump": (2.5, 2)}, "jump is 2.5; expected a whole number"),
        (
            {"known": Known(IMAGES, MASK), "jump": (3, 2), "init": IMAGES, "strength": 0.5},
            "jumps of 3 steps do not fit in 3 evaluations",
        ),
        (
            {"known": Known(IMAGES, MASK), "reference": IMAGES, "low_pass": 2},
            "known and reference exclude each other",
        ),
        (
            {"latents": FLOAT, "init": IMAGES, "strength": 0.5},
            "init and latents exclude each other",
        ),
        ({"reference": IMAGES}, "there is no low_pass"),
        ({"low_pass": 2}, "there is no reference"),
        ({"reference": IMAGES, "low_pass": 1}, "low_pass is 1; expected 2 or more, and a divisor of 8x8"),
        ({"reference": IMAGES, "low_pass": 3}, "low_pass is 3"),
        ({"reference": IMAGES, "low_pass": 16}, "low_pass is 16"),
        ({"reference": IMAGES, "low_pass": (2, -1)}, "holds until step -1"),
        ({"reference": IMAGES, "low_pass": (2, 5)}, "until step 5 holds in none of 6 evaluations"),
        ({"reference": IMAGES, "low_pass": 2.0}, "low_pass is 2.0; expected a whole number"),
        ({"latents": FLOAT[:2]}, "2 latents for 3 samples"),
        ({"latents": FLOAT[:, :, :4]}, "latents are float32 [3, 1, 4, 8]"),
        ({"latents": FLOAT + np.float32("inf")}, "latents have values that are not finite"),
        ({"latents": FLOAT[:0]}, "latents are float32 [0, 1, 8, 8]"),
        (
            {"known": Known(IMAGES, MASK), "method": "unipc", "steps": "8"},
            "known regions and references go with ddim and ddpm, not with unipc",
        ),
        (
            {"reference": IMAGES, "low_pass": 2, "method": "heun", "steps": "9"},
            "known regions and references go with ddim and ddpm, not with heun",
        ),
    ],
)
def test_what_cannot_be_asked_for(request_: dict[str, Any], message: str) -> None:
    assert message in refusal(**request_).message


def test_a_bundle_of_before(tmp_path: Path) -> None:
    """Schema 1 has no graph that edits; starts and inversion need none."""
    bundle = sham_bundle(tmp_path / "bundle")
    kept = {name: entry for name, entry in bundle.manifest.graphs.items() if "edit" not in name}
    old = Bundle(bundle.path, bundle.manifest.model_copy(update={"graphs": kept}), bundle.digest)
    before = Pipeline(old, pipeline("guided").denoiser)
    with pytest.raises(RequestError, match=r"need the graph 'edit', which .* has not") as caught:
        before(LABELS, known=Known(IMAGES, MASK))
    assert "--overwrite" in caught.value.hint
    assert len(before(LABELS, init=IMAGES, strength=0.5).x) == 3
