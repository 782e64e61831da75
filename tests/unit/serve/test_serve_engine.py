"""The engine: rows that join, leave, pause and fail, deadlines, admission, previews, the end."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bundles import UNET, pipeline
from serving import Asked, Counting, picture, running, sham_model

from admtrt.contract import CLASSIFIER_GRADIENT
from admtrt.errors import EngineError, RequestError
from admtrt.runtime.backends.graphs import GraphDenoiser
from admtrt.runtime.image_inputs import ImageInputs, Known
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.two_stage import TwoStage
from admtrt.serve.admission import Bounds, RefusedError
from admtrt.serve.costs import Costs, MeasuredDenoiser
from admtrt.serve.engine import Engine
from admtrt.serve.flight import Done, Failed, Flight, Preview
from admtrt.serve.inversions import checked_inversion
from admtrt.serve.model import Draw, Model
from admtrt.serve.policy import policy_named
from admtrt.serve.schema import InversionAsked
from admtrt.serve.sizes import Sizes, prepare, weight_bytes


@pytest.fixture
def counting() -> Counting:
    return Counting()


@pytest.fixture
def model(tmp_path: Path, counting: Counting) -> Model:
    return sham_model(tmp_path, counting)


def waiting_until(condition: Any) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


def failed(asked: Asked) -> Failed:
    end = asked.end()
    assert isinstance(end, Failed), end
    return end


KINDS: list[dict[str, Any]] = [
    {"steps": "5", "scale": 2.0},
    {"steps": "ddim7", "scale": 0.0},
    {"steps": "ddim6", "scale": 1.0, "guidance_interval": (0.5, 5.0)},
    {"method": "dpmpp", "steps": "6", "scale": 1.5},
    {"method": "unipc", "steps": "5", "order": 3, "scale": 0.0},
    {"method": "heun", "steps": "7", "scale": 1.0, "churn": (2.0, 0.0, 100.0, 1.0)},
    {"method": "dpmpp", "steps": "5", "sde": True, "threshold": "dynamic", "scale": 0.0},
]


def test_whoever_joins_when_and_beside_whom_images_are_those_of_the_pipeline() -> None:
    """Random solvers, steps, scales, sizes and moments, more rows than places: rows pause and go on."""
    alone = pipeline("guided")
    rng = np.random.default_rng(0)
    inits = rng.integers(0, 255, (2, 8, 8, 1), np.uint8)
    mask = np.zeros((8, 8), bool)
    mask[:4] = True
    kinds: list[tuple[dict[str, Any], ImageInputs]] = [(kind, ImageInputs()) for kind in KINDS]
    kinds.append(({"steps": "ddim10", "scale": 0.0}, ImageInputs(init=inits[:1], strength=0.5)))
    kinds.append(({"steps": "5", "scale": 1.0}, ImageInputs(known=Known(inits[1:], mask), jump=(2, 2))))
    kinds.append(({"steps": "ddim5", "scale": 0.0}, ImageInputs(reference=inits[:1], low_pass=2)))
    with running(Model("guided", alone), sizes=(3,)) as engine:
        asked = []
        for number in range(30):
            kind, inputs = kinds[number % len(kinds)]
            count = int(rng.integers(1, 5))
            labels, seeds = rng.integers(0, 3, count).tolist(), rng.integers(0, 2**63, count).tolist()
            every = number % 3
            client, priority = str(number % 4), "batch" if number % 5 == 0 else "interactive"
            one = Asked(
                engine, labels, seeds, more={"inputs": inputs}, client=client, priority=priority,
                preview_every=every, **kind,
            )  # fmt: skip
            asked.append((one, kind, inputs, labels, seeds))
            time.sleep(float(rng.uniform(0, 0.01)))
        for one, kind, inputs, labels, seeds in asked:
            end = one.end()
            assert isinstance(end, Done), end
            expected = alone.draw(alone.sampler(**kind), labels, seeds, inputs=inputs).x
            # Graphs of other batch sizes round otherwise; the samplers amplify it.
            np.testing.assert_allclose(np.stack(end.images), expected, atol=2e-4)
        assert engine.counts["done"] == 30
        assert engine.counts["previews"] > 0


def test_stages_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RequestError, match="draws images of 8x8"):
        Model("cascade", pipeline("guided"), pipeline("upsampler"))


def test_a_cascade_is_one_model(tmp_path: Path) -> None:
    unet = UNET.model_copy(update={"image_size": 4})
    low = sham_model(tmp_path, network=unet, classifier=None, class_names=()).pipelines[0]
    high = pipeline("upsampler")
    together = TwoStage(low, high)
    upsampling = {"upsample_steps": "ddim4"}
    with running(Model("cascade", low, high), sizes=(2,)) as engine:
        asked = {
            seed: Asked(engine, None, [seed, seed + 1], more=upsampling, steps="3", preview_every=1)
            for seed in (5, 9, 11)
        }
        for seed, one in asked.items():
            end = one.end()
            assert isinstance(end, Done)
            expected = together(None, [seed, seed + 1], steps="3", upsample_steps="ddim4").high.x
            np.testing.assert_allclose(np.stack(end.images), expected, atol=1e-5)
            previews = [event for event in one.events if isinstance(event, Preview)]
            shown = [image for event in previews for image in event.images if image is not None]
            assert {image.shape[-1] for image in shown} == {4, 8}
            assert one.flight.total == 7
        pixels = np.random.default_rng(0).integers(0, 256, (4, 4), np.uint8)
        asking = InversionAsked(images=[picture(pixels)], steps="ddim5")
        came: list[Any] = []
        flight = Flight(checked_inversion(asking, engine.model), came.append)
        engine.submit(flight)
        waiting_until(lambda: bool(came))
        expected = low.invert(pixels[None, :, :, None], steps="ddim5").x  # it ends where the images are small
        np.testing.assert_allclose(np.stack(came[0].images), expected, atol=1e-5)
    with running(Model("single", low)) as engine, pytest.raises(RequestError, match="no second stage"):
        Asked(engine, None, [1], more=upsampling)


def test_a_request_joins_in_the_middle_of_another(model: Model, counting: Counting) -> None:
    with running(model) as engine:
        long = Asked(engine, steps="1000", scale=0.0)
        waiting_until(lambda: len(counting.runs) > 20)
        short = Asked(engine, steps="5", scale=0.0)
        assert isinstance(short.end(), Done)
        assert not long.ended
        assert isinstance(long.end(), Done)


def test_batches_are_padded_to_what_is_prepared(tmp_path: Path, counting: Counting) -> None:
    class Compiling(GraphDenoiser):
        any_size = False

        def _run(self, graph: Any, feeds: Any) -> Any:
            return counting.run(graph, feeds)

    made = sham_model(tmp_path)
    denoiser = Compiling()
    bundle = made.pipelines[0].bundle
    denoiser.specs = {graph: bundle.graph_entry(graph).spec for graph in bundle.manifest.graphs}
    with running(Model("compiled", Pipeline(bundle, denoiser)), sizes=(1, 4)) as engine:
        counting.gate.clear()
        asked = [Asked(engine, [0, 1, 2], steps="5", scale=2.0), Asked(engine, [1], steps="ddim9", scale=0.0)]
        asked.append(Asked(engine, [2] * 3, steps="7", scale=1.0, guidance_interval=(0.0, 1.0)))
        counting.gate.set()
        for one in asked:
            assert isinstance(one.end(), Done)
        assert {size for _, size in counting.runs} == {4}
        assert isinstance(Asked(engine, [0], steps="5", scale=2.0).end(), Done)
        assert {size for _, size in counting.runs} == {1, 4}
        assert engine.counts["padded_rows"] > 0


def test_the_gradient_runs_on_guided_rows(model: Model, counting: Counting) -> None:
    with running(model) as engine:
        counting.gate.clear()
        asked = [Asked(engine, [0, 1], steps="5", scale=2.0), Asked(engine, [0, 1], steps="5", scale=0.0)]
        counting.gate.set()
        for one in asked:
            one.end()
    assert ("unet", 4) in counting.runs
    assert ("classifier_gradient", 4) not in counting.runs
    assert ("classifier_gradient", 2) in counting.runs


def test_leaving_frees_the_place_at_the_next_step(model: Model, counting: Counting) -> None:
    with running(model) as engine:
        long = Asked(engine, [0] * 4, steps="1000", scale=0.0)
        waiting_until(lambda: counting.runs)
        engine.cancel(long.flight)
        end = failed(long)
        steps = engine.counts["steps"]
        assert end.reason == "cancelled"
        assert isinstance(Asked(engine, steps="5", scale=0.0).end(), Done)
        assert engine.counts["steps"] - steps <= 5
        engine.cancel(long.flight)  # again, too late: nothing happens
        assert engine.counts["cancelled"] == 1


def test_rows_that_are_not_finite_fail_alone(model: Model, counting: Counting) -> None:
    bad = model.pipelines[0].slots(model.draw([0], [7], choices={"steps": "5", "scale": 0.0}).given[0]).x
    counting.spoils = lambda x: np.isclose(x[:, 0, 0, 0], bad[0, 0, 0, 0], atol=1e-7)
    with running(model) as engine:
        counting.gate.clear()
        good, spoilt = (Asked(engine, [0], [seed], steps="5", scale=0.0) for seed in (8, 7))
        counting.gate.set()
        end = failed(spoilt)
        assert end.reason == "refused"
        assert "not finite" in end.message
        assert isinstance(good.end(), Done)
        assert np.isfinite(good.end().images[0]).all()  # type: ignore[union-attr]


def test_a_step_that_fails_is_taken_again_row_by_row(model: Model, counting: Counting) -> None:
    bad = model.pipelines[0].slots(model.draw([0], [7], choices={"steps": "5", "scale": 0.0}).given[0]).x
    counting.fails = lambda x: bool(np.isclose(x[:, 0, 0, 0], bad[0, 0, 0, 0], atol=1e-7).any())
    with running(model) as engine:
        counting.gate.clear()
        good, guilty = (Asked(engine, [0], [seed], steps="5", scale=0.0) for seed in (8, 7))
        counting.gate.set()
        end = failed(guilty)
        assert (end.reason, end.message, end.hint) == ("fault", "the library refuses", "Give it less.")
        done = good.end()
        assert isinstance(done, Done)
        np.testing.assert_array_equal(done.images[0], model.pipelines[0]([0], [8], steps="5", scale=0.0).x[0])
        assert engine.ready


def test_an_engine_that_fails_again_and_again_stops(model: Model, counting: Counting) -> None:
    counting.fails = lambda _: True
    engine = Engine(model, sizes=(1,))
    engine.warm()
    engine.start()
    asked = [Asked(engine, [0], [seed], steps="5", scale=0.0, client=str(seed)) for seed in range(4)]
    assert [failed(one).reason for one in asked] == ["fault"] * 4
    engine.join(60)
    assert engine.fault == "3 steps in a row failed"
    assert not engine.ready
    with pytest.raises(RefusedError) as caught:
        Asked(engine)
    assert caught.value.reason == "draining"


def test_a_fault_of_our_own_leaves_nobody_waiting(model: Model, counting: Counting) -> None:
    def broken(_: Any) -> bool:
        raise KeyError("oh")

    counting.fails = broken
    engine = Engine(model, sizes=(4,))
    engine.warm()
    engine.run = _quietly(engine.run)  # type: ignore[method-assign]
    engine.start()
    assert failed(Asked(engine)).reason == "fault"
    engine.join(60)
    assert "KeyError" in engine.fault


def test_a_request_that_cannot_begin_fails_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Draw.slots

    def slots(self: Draw, stage: int, index: int, small: Any) -> Any:
        if self.seeds[0] == 7:
            raise MemoryError("no room")
        return made(self, stage, index, small)

    monkeypatch.setattr(Draw, "slots", slots)
    with running(model) as engine:
        good, bad = (Asked(engine, [0], [seed], steps="5", scale=0.0) for seed in (8, 7))
        assert failed(bad).message == "it cannot begin: no room"
        assert isinstance(good.end(), Done)


def _quietly(run: Any) -> Any:
    def quiet() -> None:
        with pytest.raises(KeyError):
            run()

    return quiet


def test_previews_come_as_often_as_asked_for(model: Model) -> None:
    with running(model) as engine:
        asked = Asked(engine, [0, 1], steps="10", scale=0.0, preview_every=3)
        asked.end()
    previews = [event for event in asked.events if isinstance(event, Preview)]
    assert [event.step for event in previews] == [3, 6, 9]
    assert all(image is not None and image.shape == (1, 8, 8) for event in previews for image in event.images)


def test_deadlines_are_refused_at_once_or_kept(model: Model, counting: Counting) -> None:
    with running(model, bounds=Bounds(timeout=100)) as engine:
        for graph in ("unet", "update", "classifier_gradient"):
            for _ in range(20):
                engine.stations[0].costs.record(graph, 4, 0.04)  # type: ignore[arg-type]
        with pytest.raises(RefusedError) as caught:
            Asked(engine, steps="1000", deadline=time.monotonic() + 0.5)
        assert caught.value.reason == "deadline"
        assert caught.value.retry_after > 1
        with pytest.raises(RefusedError, match=r"about \d+ s of this machine; 100 s are allowed"):
            Asked(engine, [0] * 40, steps="1000")
        counting.gate.clear()
        late = Asked(engine, steps="5", scale=0.0, deadline=time.monotonic() + 3)
        late.flight.deadline = time.monotonic()
        counting.gate.set()
        assert failed(late).reason == "expired"
        assert engine.counts["refused_deadline"] == 1


def test_queues_are_bounded_by_work_and_by_number(model: Model, counting: Counting) -> None:
    bounds = Bounds(requests=3, timeout=20.0, client_share=0.25)
    with running(model, bounds=bounds) as engine:
        counting.gate.clear()
        engine.stations[0].costs.record("unet", 4, 0.04)
        engine.stations[0].costs.record("unet", 4, 0.04)
        Asked(engine, steps="250", scale=0.0, client="greedy")  # 250 * 0.04 / 4 = 2.5 s
        with pytest.raises(RefusedError) as caught:
            Asked(engine, [0, 0], steps="250", scale=0.0, client="greedy")
        assert caught.value.reason == "client_share"
        for client in ("second", "third"):
            Asked(engine, steps="5", scale=0.0, client=client)
        with pytest.raises(RefusedError) as caught:
            Asked(engine, steps="5", scale=0.0, client="fourth")
        assert caught.value.reason == "queue_full"
        counting.gate.set()


def test_draining_finishes_what_is_in_and_takes_nothing_new(model: Model, counting: Counting) -> None:
    engine = Engine(model, sizes=(2,))
    engine.warm()
    engine.start()
    counting.gate.clear()
    asked = [Asked(engine, [0] * 3, steps="9", scale=0.0, client=str(index)) for index in range(5)]
    engine.drain()
    assert not engine.ready
    with pytest.raises(RefusedError, match="is draining"):
        Asked(engine)
    counting.gate.set()
    assert all(isinstance(one.end(), Done) for one in asked)
    engine.join(60)
    assert not engine.is_alive()


def test_aborting_tells_whom_it_cuts_off(model: Model, counting: Counting) -> None:
    engine = Engine(model, sizes=(2,))
    engine.warm()
    engine.start()
    asked = [Asked(engine, steps="1000", scale=0.0, client=str(index)) for index in range(5)]
    engine.abort()
    assert {failed(one).reason for one in asked} == {"cut"}
    engine.join(60)
    assert engine.counts["cut"] == 5


def test_a_static_server_answers_when_its_batch_ends(model: Model, counting: Counting) -> None:
    with running(model, policy=policy_named("static-any")) as engine:
        counting.gate.clear()
        short, long = Asked(engine, steps="3", scale=0.0), Asked(engine, steps="50", scale=0.0)
        late = Asked(engine, steps="3", scale=0.0)
        counting.gate.set()
        late.end()
        assert long.ended
        assert short.ended


def test_sizes_fit_the_memory(tmp_path: Path) -> None:
    class Copying(GraphDenoiser):
        any_size = False
        copies_weights = True

        def __init__(self) -> None:
            self.prepared: Any = None

        def _run(self, graph: Any, feeds: Any) -> Any:
            size = len(feeds["coefficients" if graph.startswith(("edit", "upd", "thr")) else "t"])
            time.sleep(0.001)  # whatever the batch: the largest is best
            return {"size": size}

        def prepare(self, sizes: Any) -> None:
            self.prepared = set(sizes["unet"])

    made = sham_model(tmp_path, graph=b"\x08\x0a" * 500).pipelines[0]
    denoiser = Copying()
    denoiser.specs = {graph: made.bundle.graph_entry(graph).spec for graph in made.bundle.manifest.graphs}
    copy = sum(weight_bytes(made.bundle, graph) for graph in made.bundle.manifest.sampled_graphs)
    assert copy == 2000  # the UNet's and the classifier's
    pipe = Pipeline(made.bundle, denoiser)
    for memory, expected in (
        (8 * copy, (1, 2, 3, 4, 6, 8, 12, 16)),
        (7 * copy, (1, 2, 4, 8, 16)),
        (4 * copy, (1, 16)),
        (copy, (1,)),
    ):
        sizes = prepare(pipe, Costs(), max_rows=16, memory=memory)
        assert sizes.prepared == expected
        assert denoiser.prepared == set(expected)
    assert [sizes.padded(count) for count in (1,)] == [1]
    assert prepare(pipe, Costs(), max_rows=16, memory=2 * copy, sizes=(3, 7)).padded(2) == 3
    for wrong in ({"sizes": (1, 2, 3)}, {"memory": copy - 1}):
        with pytest.raises(RequestError, match="the weights take"):
            prepare(pipe, Costs(), **{"max_rows": 16, "memory": 2 * copy} | wrong)  # type: ignore[arg-type]


def test_a_graph_that_gains_nothing_from_a_batch_runs_in_pieces(
    tmp_path: Path, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    class Uneven(GraphDenoiser):
        any_size = False

        def _run(self, graph: Any, feeds: Any) -> Any:
            seconds = {"unet": 0.1, CLASSIFIER_GRADIENT: 0.2 * len(feeds.get("x", ()))}
            now[0] += seconds.get(graph, 0)
            return counting.run(graph, feeds)

        def prepare(self, sizes: Any) -> None:
            self.prepared = sizes

    made = sham_model(tmp_path).pipelines[0]
    denoiser = Uneven()
    denoiser.specs = {graph: made.bundle.graph_entry(graph).spec for graph in made.bundle.manifest.graphs}
    model = Model("uneven", Pipeline(made.bundle, denoiser))
    monkeypatch.setattr("admtrt.serve.sizes.time", SimpleNamespace(perf_counter=lambda: now[0]))
    with running(model, sizes=()) as engine:
        cap = engine.stations[0].sizes.cap
        assert cap == 8  # 0.2125 s a row, within 5% of the 0.206 of 16 rows
        assert denoiser.prepared["unet"][-1] == denoiser.prepared["update"][-1] == cap
        assert denoiser.prepared[CLASSIFIER_GRADIENT] == (1,)
        counting.gate.clear()
        counting.runs.clear()
        asked = [Asked(engine, [0] * cap, steps="3", scale=2.0)]
        counting.gate.set()
        assert isinstance(asked[0].end(), Done)
    sizes = {graph: {size for name, size in counting.runs if name == graph} for graph, _ in counting.runs}
    assert sizes == {"unet": {cap}, "update": {cap}, CLASSIFIER_GRADIENT: {1}}


def test_pieces_are_put_together_again() -> None:
    class Doubling:
        def __init__(self) -> None:
            self.batches: list[int] = []

        def run(self, graph: Any, feeds: Any) -> Any:
            self.batches.append(len(feeds["x"]))
            return {"twice": 2 * feeds["x"]}

    for any_size, batches in ((False, [4, 4, 2]), (True, [4, 4, 1])):
        doubling, costs = Doubling(), Costs()
        sizes = Sizes((16,), any_size, {"guide.own": (2, 4)})
        measured = MeasuredDenoiser(doubling, costs, sizes)
        x = np.arange(9.0).reshape(9, 1)
        np.testing.assert_array_equal(measured.run("guide.own", {"x": x})["twice"], 2 * x)
        assert doubling.batches == batches
        assert costs.seconds("guide.own", 8) == 2 * costs.seconds("guide.own", 4) > 0


def test_errors_of_the_library_at_start_are_told(tmp_path: Path, counting: Counting) -> None:
    class Refusing(Counting):
        def run(self, graph: str, feeds: Any) -> dict[str, Any]:
            raise EngineError("no memory")

    with pytest.raises(EngineError, match="no memory"):
        Engine(sham_model(tmp_path, Refusing())).warm()
