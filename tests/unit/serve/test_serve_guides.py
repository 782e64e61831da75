"""Guides over HTTP: the images of the pipeline, whoever joins; targets that do not fit; which graphs run."""

from __future__ import annotations

import asyncio
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import exported_bundle, pipeline, sham_bundle
from serving import Asked, Counting, archive, asynchronous, opened, picture, running, serving

from admtrt.bundle import Bundle
from admtrt.errors import RequestError
from admtrt.export.guides import losses
from admtrt.runtime.backends.graphs import GraphDenoiser
from admtrt.runtime.guide_targets import GuideTargets
from admtrt.runtime.image_inputs import ImageInputs
from admtrt.runtime.pipeline import Pipeline
from admtrt.schedule.guides import GuideConfig
from admtrt.serve.admission import own_seconds
from admtrt.serve.costs import Costs
from admtrt.serve.flight import Done, Flight
from admtrt.serve.model import Model
from admtrt.serve.sizes import open_graphs, prepare, weight_bytes

SAMPLES = "/v1/samples"
EVENT = (1, 8, 8)
IMAGE = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
MASK = np.zeros((8, 8), np.uint8)
MASK[:, :4] = 255
TWO = np.random.default_rng(1).uniform(-1, 1, (2, *EVENT)).astype(np.float32)
SMALL = np.random.default_rng(2).uniform(-1, 1, (1, 1, 4, 4)).astype(np.float32)
WEIGHTS = np.array([[1, 0.5, -1]], np.float32)


def steered() -> Model:
    return Model("steered", pipeline("steered"))


Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
"""Arguments that a request and the pipeline share, and the guides in the form of each."""


@cache
def cases() -> list[Case]:
    linear = {"measurement": archive(arr_0=TWO), "mask": picture(MASK)}
    ours = {"measurement": TWO, "mask": MASK > 0}
    return [
        (
            {"classes": [0, 1], "seeds": [1, 2], "steps": "ddim6", "scale": 1.5},
            {"linear": linear},
            {"linear": ours},
        ),
        (
            {"seeds": [3, 4], "steps": "6", "scale": 0, "guide_scale": {"linear": 0.4}},
            {"linear": {"measurement": archive(arr_0=SMALL), "operator": "sr:2"}},
            {"linear": {"measurement": SMALL, "operator": "sr:2"}},
        ),
        (
            {
                "seeds": [5],
                "steps": 7,
                "method": "dpmpp",
                "scale": 0,
                "guide_place": {"linear": "score", "tv": "before_clip"},
                "guide_clip": {"linear": False},
            },
            {"linear": {"measurement": picture(IMAGE)}, "tv": {}},
            {"linear": {"measurement": IMAGE[None, :, :, None]}, "tv": {}},
        ),
        (
            {"classes": ["bee"], "seeds": [6], "steps": "ddim6", "scale": 0, "guide_scale": {"noisy": 3.0}},
            {"noisy": {}},
            {"noisy": {}},
        ),
        (
            {"seeds": [7], "steps": "ddim8", "scale": 0, "guide_interval": {"noisy": [0.5, 5.0]}},
            {"noisy": {"weights": archive(arr_0=WEIGHTS)}},
            {"noisy": {"weights": WEIGHTS}},
        ),
        (
            {"classes": [2], "seeds": [8], "steps": "ddim5", "guide_scale": {"weak": 1.7}, "recurrence": 2},
            {"weak": {}},
            {"weak": {}},
        ),
        ({"classes": [1], "seeds": [9], "steps": "ddim6"}, {}, {}),
    ]


def alone(told: dict[str, Any], guides: dict[str, Any]) -> Any:
    """The same images of the pipeline."""
    given = {**told, "guides": guides}
    if "guide_interval" in given:
        given["guide_interval"] = {name: tuple(pair) for name, pair in given["guide_interval"].items()}
    return pipeline("steered")(given.pop("classes", None), given.pop("seeds"), **given)


@asynchronous
async def test_guided_images_are_those_of_the_pipeline(tmp_path: Path) -> None:
    async with serving(tmp_path, steered(), engine={"sizes": (1, 2, 4)}) as (client, service):

        async def one(told: dict[str, Any], sent: dict[str, Any], theirs: dict[str, Any]) -> None:
            reply = await client("POST", SAMPLES, {**told, "guides": sent})
            assert reply.status == 200, reply.body
            drawn = np.stack([opened(text) for text in reply.json["images"]])
            expected = alone(told, theirs).images[..., 0]
            assert np.abs(drawn.astype(int) - expected).max() <= 1, told

        for case in cases():
            await one(*case)
        await asyncio.gather(*(one(*case) for case in cases()))  # and all of them in the same steps
        assert service.engines["steered"].counts["done"] == 2 * len(cases())
        told, sent, theirs = cases()[0]
        job = (await client("POST", "/v1/jobs", {**told, "guides": sent})).json
        while (await client("GET", job["url"])).json["state"] in ("queued", "running"):
            await asyncio.sleep(0.005)
        result = (await client("GET", job["url"] + "/result")).json
        expected = alone(told, theirs).images[..., 0]
        assert np.abs(np.stack([opened(text) for text in result["images"]]).astype(int) - expected).max() <= 1
        plain = (await client("POST", SAMPLES, told)).json
        assert plain["images"] != result["images"]


def test_requests_with_guides_join_at_any_step() -> None:
    """Forty requests at random moments; the policy pauses and resumes some of their rows."""
    generator = random.Random(0)
    alike = [alone(told, theirs) for told, _, theirs in cases()]
    with running(steered(), sizes=(1, 2, 3)) as engine:
        model, asked = engine.model, []
        for number in range(40):
            which = generator.randrange(len(alike))
            told, _, theirs = cases()[which]
            draw = drawn_of(model, told, theirs)
            came: list[Any] = []
            flight = Flight(draw, came.append, client=str(number % 3))
            engine.submit(flight)
            asked.append((which, came))
            before = engine.counts["steps"]
            while engine.counts["steps"] < before + generator.randrange(4) and engine.flights:
                pass
        engine.drain()
        engine.join(60)
        for which, came in asked:
            assert isinstance(came[-1], Done), came
            images = (np.stack(came[-1].images) + 1) * 127.5
            expected = (alike[which].x + 1) * 127.5
            assert np.abs(np.clip(images, 0, 255) - np.clip(expected, 0, 255)).max() <= 1, cases()[which][0]


def drawn_of(model: Model, told: dict[str, Any], theirs: dict[str, Any]) -> Any:
    """The draw of the pipeline's arguments."""
    own = {name: value for name, value in told.items() if not name.startswith("guide_")}
    labels, seeds = own.pop("classes", None), own.pop("seeds")
    options = {name: told.get(f"guide_{name}") for name in ("scale", "interval", "place", "clip")}
    inputs = ImageInputs(targets=GuideTargets(theirs), recurrence=own.pop("recurrence", None))
    choices = {**own, "guided_by": model.pipelines[0].guide_choices(theirs, **options)}  # type: ignore[arg-type]
    return model.draw(labels, seeds, choices=choices, inputs=inputs)  # type: ignore[arg-type]


def measured(given: Any, **more: Any) -> dict[str, Any]:
    """A request that is led by a measurement."""
    return {"guides": {"linear": {"measurement": given, **more}}}


def test_guides_run_on_openvino() -> None:
    """A library that compiles each size, and names an output of one of the guides twice."""
    pytest.importorskip("openvino")
    own = Pipeline.from_bundle(exported_bundle("steered"), backend="openvino", threads=1)
    with running(Model("steered", own), sizes=(1, 2)) as engine:
        asked = []
        for told, _, theirs in cases():
            came: list[Any] = []
            engine.submit(Flight(drawn_of(engine.model, told, theirs), came.append))
            asked.append((told, theirs, came))
        engine.drain()
        engine.join(60)
    for told, theirs, came in asked:
        assert isinstance(came[-1], Done), came
        images = (np.stack(came[-1].images) + 1) * 127.5
        expected = (alone(told, theirs).x + 1) * 127.5
        assert np.abs(np.clip(images, 0, 255) - np.clip(expected, 0, 255)).max() <= 1, told


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"guides": {"other": {}}}, 400, "model 'steered' has no guide 'other'; it has linear, tv, noisy"),
    ({"guides": {"linear": {}}}, 400, "guide 'linear' needs the target 'measurement'"),
    ({"guides": {"linear": {"level": "AA=="}}}, 400, "guide 'linear' has no target 'level'"),
    (measured("?"), 400, "guides.linear.measurement is not base64"),
    (measured("AAAA"), 400, "cannot read guides.linear.measurement"),
    (measured("UEsDBA=="), 400, "cannot read the target guides.linear"),
    (measured(archive(x=TWO)), 400, "has no arr_0; it has x"),
    (
        {"guides": {"linear": {"measurement": archive(arr_0=TWO.astype(np.float64))}}},
        400, "target linear.measurement is float64 [2, 1, 8, 8]; expected float32 [N, 1, 8, 8]",
    ),
    (measured(archive(arr_0=TWO[:, :, :4])), 400, "float32 [2, 1, 4, 8]; expected"),
    (measured(archive(arr_0=np.float32(1))), 400, "is float32 []; expected"),
    (measured(archive(arr_0=TWO[:0])), 400, "has no row"),
    (measured(archive(arr_0=TWO * np.inf)), 400, "not finite"),
    (
        {"guides": {"linear": {"measurement": archive(arr_0=np.zeros((10**6, *EVENT), np.float32))}}},
        400, "is float32 [1000000, 1, 8, 8]; expected float32 [N, 1, 8, 8], N at most 64",
    ),
    (measured(archive(arr_0=np.array([{}], object))), 400, "cannot read the target"),
    (measured(picture(np.zeros((9, 8)))), 400, "8x9 pixels; expected 8x8"),
    (measured(archive(arr_0=TWO), operator="zoom:2"), 400, "is unknown"),
    (measured(archive(arr_0=TWO), operator="x" * 201), 400, "200 characters"),
    (measured(archive(arr_0=TWO), operator="blur:900000:5"), 400, "wider than"),
    (
        {"guides": {"linear": {"measurement": archive(arr_0=TWO), "mask": picture(np.zeros((8, 8)))}}},
        400, "the mask knows no pixel",
    ),
    ({"guides": {"noisy": {"weights": picture(IMAGE)}}}, 400, "cannot read the target guides.noisy.weights"),
    ({"guides": {"noisy": {}}}, 400, "guide 'noisy' needs a class for each sample"),
    ({"guides": {"tv": {}}, "guide_scale": {"linear": 1.0}}, 400, "scale was given of the guide 'linear'"),
    ({"guide_scale": {"tv": 1.0}}, 400, "scale was given of the guide 'tv', which does not guide"),
    ({"guides": {"tv": {}}, "guide_scale": {"tv": 1e9}}, 400, "out of range"),
    ({"guides": {"tv": {}}, "guide_interval": {"tv": [3.0, 1.0]}}, 400, "is empty"),
    ({"guides": {"tv": {}}, "guide_place": {"tv": "reference"}}, 400, "cannot enter in the place"),
    ({"guides": {"tv": {}}, "method": "unipc", "steps": 5}, 400, "shifts the state"),
    ({"guides": {"linear": {"measurement": archive(arr_0=TWO)}}, "n": 3}, 400, "2 rows of the target"),
    ({"guides": {"tv": {}}, "recurrence": 1}, 400, "recurrence is 1"),
    ({"guides": ["tv"]}, 422, "guides: Input should be an object"),
    ({"guides": {"tv": {"x": 1}}}, 422, "guides: Input should be a valid string"),
    ({"guides": {"../x": {}}}, 422, "guides: String should match pattern"),
    ({"guides": {"tv": {}}, "guide_place": {"tv": "nowhere"}}, 422, "guide_place: Input should be"),
    ({"guides": {"tv": {}}, "guide_clip": {"tv": 1}}, 422, "guide_clip: "),
    ({"guides": {f"g{number}": {} for number in range(9)}}, 422, "guides: Dictionary should have at most 8"),
]  # fmt: skip


@asynchronous
async def test_bad_targets_are_refused_in_a_sentence(tmp_path: Path) -> None:
    async with serving(tmp_path, steered()) as (client, service):
        for wrong, status, message in BAD:
            asked = {"steps": "ddim5", "scale": 0, **wrong}
            for path in (SAMPLES, "/v1/jobs"):
                reply = await client("POST", path, asked)
                told = str(reply.error["message"])
                assert (reply.status, message in told) == (status, True), (wrong, reply.body[:300])
        assert service.engines["steered"].counts["accepted"] == 0


@asynchronous
async def test_guides_are_described(tmp_path: Path) -> None:
    async with serving(tmp_path, steered()) as (client, _):
        told = (await client("GET", "/v1/models/steered")).json["guides"]
        assert list(told) == ["linear", "tv", "noisy", "weak"]
        assert told["linear"]["targets"]["measurement"] == [1, 8, 8]
        assert (told["linear"]["place"], told["tv"]["targets"], told["weak"]["kind"]) == (
            "shift",
            {},
            "reference",
        )
        fields = (await client("GET", "/openapi.json")).json["components"]["schemas"]["SampleRequest"]
        assert {"guides", "guide_scale", "guide_interval", "guide_place", "guide_clip"} <= set(
            fields["properties"]
        )


def test_rows_with_a_guide_run_its_graph_and_others_the_plain_unet(tmp_path: Path) -> None:
    guides = {"tv": losses.total_variation(EVENT).config, "seen": GuideConfig(kind="noisy", place="score")}

    class Sized(GraphDenoiser):
        any_size = False

        def __init__(self, bundle: Bundle) -> None:
            self.specs = {graph: bundle.graph_entry(graph).spec for graph in bundle.manifest.graphs}
            self.counting = Counting()

        def _run(self, graph: Any, feeds: Any) -> Any:
            return self.counting.run(graph, feeds)

    bundle = sham_bundle(tmp_path / "bundle", guides=guides)
    sized = Sized(bundle)
    denoiser = sized.counting
    model = Model("sham", Pipeline(bundle, sized))
    with running(model, sizes=(2, 4)) as engine:
        denoiser.gate.clear()
        plain = Asked(engine, [0, 1], scale=0.0, steps=4, method="ddim")
        by_loss, by_noise = (
            Asked(
                engine,
                [0],
                scale=0.0,
                steps=4,
                method="ddim",
                guided_by=model.pipelines[0].guide_choices([name]),
                more={"inputs": drawn_of_nothing(name)},
            )
            for name in ("tv", "seen")
        )
        denoiser.gate.set()
        assert all(isinstance(one.end(), Done) for one in (plain, by_loss, by_noise))
    runs = denoiser.runs
    # One row each, filled up to a size that is prepared, and three for which the UNet runs alone. The first
    # step may begin before all have come.
    together = [
        sorted(runs[max(0, place - 3) : place]) for place, run in enumerate(runs) if run == ("update_full", 4)
    ]
    assert [("guide.seen", 2), ("guide.tv", 2), ("unet", 4)] in together
    runs = by_loss.flight.draw.runs[0]
    assert runs == {"guide.tv": 4, "update_full": 4}
    assert by_noise.flight.draw.runs[0] == {"guide.seen": 4, "unet": 4, "update_full": 4}
    costs = engine.stations[0].costs
    for graph, seconds in (("unet", 1.0), ("guide.tv", 2.5), ("update_full", 0.1), ("update", 0.1)):
        for _ in range(15):
            costs.record(graph, 4, seconds)
    assert own_seconds(engine.stations, by_loss.flight, 3) == pytest.approx(4 * 2.6)


def drawn_of_nothing(guide: str) -> Any:
    return ImageInputs(targets=GuideTargets({guide: {}}))


def test_only_the_guides_that_are_served_are_opened_prepared_and_counted() -> None:
    path = exported_bundle("steered")
    some = Pipeline.from_bundle(path, threads=1, guides=["tv"])
    model = Model("some", some)
    assert list(model.guides) == ["tv"]
    graphs = open_graphs(some)
    assert [graph for graph in graphs if graph.startswith("guide.")] == ["guide.tv"]
    costs = Costs()
    sizes = prepare(some, costs, max_rows=2, memory=2**40, sizes=(1, 2))
    assert sizes.prepared == (1, 2)
    assert costs.seconds("guide.tv", 2) > 0
    assert costs.seconds("update_full", 2) > 0
    assert costs.seconds("guide.linear", 2) == 0
    assert weight_bytes(some.bundle, "guide.tv") >= weight_bytes(some.bundle, "unet") > 0
    assert weight_bytes(some.bundle, "update_full") == 0
    few = sum(weight_bytes(some.bundle, graph) for graph in graphs)
    with pytest.raises(RequestError, match=r"the weights take"):
        prepare(some, Costs(), max_rows=2, memory=few - 1)
    told: list[str] = []
    prepare(some, Costs(), max_rows=2, memory=few, sizes=(2,), note=told.append)
    assert "of weights" in told[0]
    assert model.target_bytes == 2**20
    assert steered().target_bytes > 2**20 + 4 * (64 * 4 + 3)
