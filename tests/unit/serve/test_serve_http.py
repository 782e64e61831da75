"""The server over ASGI: answers, streams, authorisation, refusals, models, OpenAI's interface."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from bundles import pipeline
from serving import Client, Counting, archive, asynchronous, guided, opened, picture, serving, sham_model

from admtrt.runtime.image_inputs import Known
from admtrt.serve.admission import Bounds
from admtrt.serve.model import Model
from admtrt.serve.openapi import description

SAMPLES = "/v1/samples"


@asynchronous
async def test_images_are_those_of_the_pipeline(tmp_path: Path) -> None:
    pixels = np.arange(64).reshape(8, 8) * 4
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    x = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
    same: list[dict[str, Any]] = [
        {"classes": ["ant", 2], "seeds": [1, 2**64 - 1]},
        {
            "classes": [1],
            "seeds": [3],
            "steps": 6,
            "method": "dpmpp",
            "order": 2,
            "form": "single",
            "scale": 0.5,
        },
        {
            "classes": [1],
            "seeds": [4],
            "steps": "ddim5",
            "eta": 0.5,
            "clip": False,
            "guidance_interval": [0.5, 5],
        },
        {"classes": [2], "seeds": [6], "method": "ddim", "steps": "leading:5+1"},
    ]
    one = pixels[None, :, :, None].astype(np.uint8)
    images: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
        ({"classes": [2], "seeds": [5], "scale": 0}, {"init": [picture(pixels)]}, {"init": one}),
        (
            {"classes": [2], "seeds": [7], "jump": [2, 2]},
            {"known": [picture(pixels)], "mask": [picture(mask)]},
            {"known": Known(one, mask > 0)},
        ),
        (
            {"classes": [2], "seeds": [8], "steps": "ddim5", "low_pass": [4, 1]},
            {"reference": [picture(pixels)]},
            {"reference": one},
        ),
        ({"classes": [0, 1], "seeds": [0, 1]}, {"latents": archive(latents=x)}, {"latents": x}),
    ]
    images[0][0]["strength"] = 0.6
    cases = [(asked, asked) for asked in same]
    cases += [({**fields, **sent}, {**fields, **given}) for fields, sent, given in images]
    alone = pipeline("guided")
    async with serving(tmp_path, guided(), engine={"sizes": (2,)}) as (client, _):
        for asked, arguments in cases:
            reply = await client("POST", SAMPLES, asked)
            assert reply.status == 200, reply.body
            given = {
                name: tuple(v) if name in ("guidance_interval", "jump", "low_pass") else v
                for name, v in arguments.items()
            }
            expected = alone(given.pop("classes"), **given)
            told = reply.json
            drawn = np.stack([opened(text) for text in told["images"]])
            assert np.abs(drawn.astype(int) - expected.images[..., 0]).max() <= 1, asked
            assert [int(seed) for seed in told["seeds"]] == list(expected.seeds)
            assert told["classes"] == expected.labels.tolist()  # type: ignore[union-attr]
            assert told["model"] == "guided"
            assert told["timing"]["drawn"] > 0
        assert reply.json["seeds"] == [0, 1]
        reply = await client("POST", SAMPLES, {**same[0], "format": "npz"})
        expected = alone(same[0]["classes"], same[0]["seeds"])
        with np.load(io.BytesIO(reply.body)) as held:
            assert np.abs(held["arr_0"].astype(int) - expected.images).max() <= 1
            assert held["arr_1"].tolist() == [0, 2]
        assert reply.headers["x-seeds"] == f"1,{2**64 - 1}"
        again = [await client("POST", SAMPLES, {"classes": [0], "steps": 2}) for _ in range(2)]
        seeds = [reply.json["seeds"][0] for reply in again]
        assert seeds[0] != seeds[1]
        assert max(seeds) < 2**53


@asynchronous
async def test_an_upsampler_takes_its_images(tmp_path: Path) -> None:
    small = np.random.default_rng(0).integers(0, 255, (4, 4), np.uint8)
    async with serving(tmp_path, Model("up", pipeline("upsampler"))) as (client, _):
        asked = {"low_res": [picture(small)], "seeds": [3]}
        reply = await client("POST", SAMPLES, asked)
        expected = pipeline("upsampler")(None, [3], low_res=small[None, :, :, None]).images[0, :, :, 0]
        assert np.abs(opened(reply.json["images"][0]).astype(int) - expected).max() <= 1
        assert reply.json["classes"] is None
        for wrong, message in (
            ({}, "low_res"),
            ({"low_res": [picture(np.zeros((8, 8)))]}, "low_res[0] has 8x8 pixels; expected 4x4"),
        ):
            reply = await client("POST", SAMPLES, wrong)
            assert reply.status == 400
            assert message in reply.error["message"]


@asynchronous
async def test_inversion_is_that_of_the_pipeline(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2, 8, 8, 1), np.uint8)
    sent = [picture(image[..., 0]) for image in images]
    async with serving(tmp_path, guided(), engine={"sizes": (1, 2, 3)}) as (client, _):
        asked = {"images": sent, "steps": "ddim10", "levels": 8}
        other = {"classes": [1], "seeds": [1], "steps": "ddim10"}
        reply, _ = await asyncio.gather(
            client("POST", "/v1/inversions", asked), client("POST", SAMPLES, other)
        )
        assert reply.status == 200, reply.body
        expected = pipeline("guided").invert(images, steps="ddim10", levels=8)
        with np.load(io.BytesIO(base64.b64decode(reply.json["latents"]))) as held:
            assert np.abs(held["latents"] - expected.x).max() < 1e-4  # rounding of other batch sizes
            assert (int(held["levels"]), str(held["steps"]), bool(held["clip"])) == (8, "ddim10", False)
            assert np.array_equal(held["images"], images)
        assert reply.json.keys() == {"id", "model", "classes", "steps", "timing", "latents"}
        assert reply.json["steps"] == 8
        again = {"latents": reply.json["latents"], "classes": [0, 0], "scale": 0, "seeds": [0, 0]}
        back = (await client("POST", SAMPLES, again)).json["images"]
        decoded = pipeline("guided")([0, 0], [0, 0], latents=expected, scale=0.0).images[..., 0]
        drawn = np.stack([opened(text) for text in back]).astype(int)
        assert np.abs(drawn - decoded).max() <= 1
        file = await client("POST", "/v1/inversions", asked | {"format": "npz"})
        assert file.headers["content-type"] == "application/x-npz"
        with np.load(io.BytesIO(file.body)) as held:
            assert held["latents"].shape == (2, 1, 8, 8)
        for wrong, status, message in (
            ({}, 422, "images: Field required"),
            ({"images": ["x"]}, 400, "images[0] is not base64"),
            ({"images": sent, "levels": 10, "steps": "ddim10"}, 400, "levels"),
            ({"images": sent, "method": "ddpm"}, 422, "method: Extra inputs"),
            ({"images": sent, "steps": "ddim2000"}, 400, "2000"),
            ({"images": [picture(np.zeros((9, 8)))]}, 400, "8x9 pixels"),
        ):
            reply = await client("POST", "/v1/inversions", wrong)
            assert (reply.status, message in reply.error["message"]) == (status, True), reply.body


@asynchronous
async def test_streams_show_the_way(tmp_path: Path) -> None:
    async with serving(tmp_path, guided()) as (client, _):
        # Long enough for the loop to be scheduled between two previews on a machine that is busy.
        asked = {"classes": [1, 2], "seeds": [1, 2], "steps": "ddim250", "stream": True, "preview_every": 100}
        reply = await client("POST", SAMPLES, asked)
        assert reply.headers["content-type"].startswith("text/event-stream")
        names = [name for name, _ in reply.events]
        assert names[0] == "accepted"
        assert names[-1] == "done"
        assert 0 < names.count("preview") <= 2  # whoever reads slowly misses some
        accepted, done = reply.events[0][1], reply.events[-1][1]
        assert accepted == {
            "id": done["id"],
            "model": "guided",
            "seeds": [1, 2],
            "classes": [1, 2],
            "steps": 250,
        }
        preview = reply.events[-2][1]
        assert preview["step"] in (100, 200)
        assert opened(preview["images"][1]).shape == (8, 8)
        plain = await client("POST", SAMPLES, asked | {"stream": False, "preview_every": 0})
        assert plain.json["images"] == done["images"]


@asynchronous
async def test_hosts_and_tokens(tmp_path: Path) -> None:
    tokens = {"a-token-of-alice": "alice", "a-token-of-bob--": "bob"}
    async with serving(tmp_path, guided(), tokens=tokens, hosts=frozenset({"draw.example"})) as (client, _):
        for host, status in (
            ("localhost", 200), ("LOCALHOST:8000", 200), ("127.0.0.1:1", 200), ("[::1]:80", 200),
            ("::1", 200), ("10.0.0.7", 200), ("draw.example:443", 200), ("evil.example", 421), ("", 421),
            ("localhost.evil.example", 421), ("127.0.0.1.evil.example", 421), ("evil.example:localhost", 421),
        ):  # fmt: skip
            assert (await client("GET", "/health/live", host=host)).status == status, host
        for path in (SAMPLES, "/v1/jobs", "/v1/images/generations"):
            reply = await client("POST", path, {"classes": [0]})
            assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
        for header in (
            "Bearer wrong",
            "Basic a-token-of-alice",
            "a-token-of-alice",
            "Bearer",
            "Bearer a-token-of-alic",
        ):
            assert (await client("GET", "/v1/models", authorization=header)).status == 401
        for path in ("/metrics", "/v1/models", "/v1/jobs/x"):
            assert (await client("GET", path)).status == 401
        for path in ("/", "/openapi.json", "/health/live", "/v2/health/ready"):
            assert (await client("GET", path)).status == 200
        alice, bob = ({"authorization": f"bearer {token}"} for token in tokens)
        assert (await client("GET", "/v1/models", **alice)).status == 200
        job = (await client("POST", "/v1/jobs", {"classes": [0], "steps": 2}, **alice)).json
        assert (await client("GET", job["url"], **bob)).status == 404
        assert (await client("DELETE", job["url"], **bob)).status == 404
        assert (await client("GET", job["url"], **alice)).status == 200


@asynchronous
async def test_pages_elsewhere_may_not_ask(tmp_path: Path) -> None:
    preflight = {"origin": "https://a.example", "access_control_request_method": "POST"}
    async with serving(tmp_path, sham_model(tmp_path)) as (client, _):
        reply = await client("OPTIONS", SAMPLES, **preflight)
        assert reply.status == 405
        assert "access-control-allow-origin" not in reply.headers
    (tmp_path / "second").mkdir()
    async with serving(
        tmp_path / "second", sham_model(tmp_path / "second"), origins=("https://a.example",)
    ) as (client, _):
        assert (await client("OPTIONS", SAMPLES, **preflight)).headers[
            "access-control-allow-origin"
        ] == "https://a.example"
        reply = await client("OPTIONS", SAMPLES, **preflight | {"origin": "https://b.example"})
        assert "access-control-allow-origin" not in reply.headers


@asynchronous
async def test_who_leaves_frees_the_place(tmp_path: Path) -> None:
    denoiser = Counting()
    denoiser.fails = lambda _: time.sleep(0.005)  # a busy machine must not be done before anyone leaves
    async with serving(tmp_path, sham_model(tmp_path, denoiser)) as (client, service):
        engine = service.engines["sham"]
        for stream in (False, True):

            async def begun() -> None:
                while not any(flight.started for flight in engine.flights):
                    await asyncio.sleep(0.001)

            asked = {"classes": [0], "steps": 1000, "scale": 0, "stream": stream}
            reply = await client("POST", SAMPLES, asked, leave=begun)
            assert reply.status == (200 if stream else 499)
            assert not reply.body or b"event: done" not in reply.body
            while engine.flights:
                await asyncio.sleep(0.001)
        assert engine.counts["cancelled"] == 2
        assert engine.counts["done"] == 0
        text = (await client("GET", "/metrics")).body.decode()
        assert 'admtrt_requests_total{code="499",route="/v1/samples"} 1.0' in text


@asynchronous
async def test_what_cannot_be_let_in_is_told_when_to_come_again(tmp_path: Path) -> None:
    denoiser = Counting()
    bounds = Bounds(requests=1, timeout=50)
    async with serving(tmp_path, sham_model(tmp_path, denoiser), engine={"bounds": bounds}) as (
        client,
        service,
    ):
        engine = service.engines["sham"]
        denoiser.gate.clear()
        asked = {"classes": [0], "steps": 5, "scale": 0}
        first = asyncio.create_task(client("POST", SAMPLES, asked))
        while not engine.flights:
            await asyncio.sleep(0.001)
        reply = await client("POST", SAMPLES, asked)
        assert (reply.status, reply.error["code"]) == (429, "queue_full")
        assert int(reply.headers["retry-after"]) >= 1
        engine.drain()
        assert (await client("GET", "/health/ready")).status == 503
        assert (await client("GET", "/health/live")).status == 200
        reply = await client("POST", SAMPLES, asked)
        assert (reply.status, reply.error["code"]) == (503, "draining")
        assert "retry-after" in reply.headers
        denoiser.gate.set()
        assert (await first).status == 200
    (tmp_path / "2").mkdir()
    denoiser = Counting()
    async with serving(tmp_path / "2", sham_model(tmp_path / "2", denoiser)) as (client, _):
        denoiser.gate.clear()
        late = asyncio.create_task(client("POST", SAMPLES, {**asked, "timeout": 0.05}))
        await asyncio.sleep(0.1)
        denoiser.gate.set()
        reply = await late
        assert (reply.status, reply.error["code"]) == (504, "expired")


@asynchronous
async def test_faults_are_told_without_their_insides(tmp_path: Path) -> None:
    denoiser = Counting()
    async with serving(tmp_path, sham_model(tmp_path, denoiser)) as (client, service):
        denoiser.spoils = lambda x: np.ones(len(x), bool)
        asked = {"classes": [0], "steps": 5, "scale": 0}
        reply = await client("POST", SAMPLES, asked)
        assert (reply.status, reply.error["code"]) == (400, "bad_request")
        assert "not finite" in reply.error["message"]
        denoiser.spoils = lambda x: np.zeros(len(x), bool)
        service.answer = None  # type: ignore[assignment,method-assign]
        reply = await client("POST", SAMPLES, asked)
        assert (reply.status, reply.error["code"]) == (500, "fault")
        assert b"NoneType" not in reply.body
        reply = await client("POST", SAMPLES, asked | {"stream": True})
        assert reply.events[-1][0] == "error"
        assert b"NoneType" not in reply.body


@asynchronous
async def test_models_page_and_description(tmp_path: Path) -> None:
    async with serving(tmp_path, guided(), sham_model(tmp_path)) as (client, _):
        listed = (await client("GET", "/v1/models")).json["data"]
        assert [one["id"] for one in listed] == ["guided", "sham"]
        assert listed[0]["class_names"] == ["ant", "bee", "cat"]
        assert listed[0]["image"] == {"height": 8, "width": 8, "channels": 1}
        assert (await client("GET", "/v1/models/sham")).json == listed[1]
        assert (await client("POST", SAMPLES, {"classes": [0]})).status == 404  # of two, which?
        page = await client("GET", "/")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        for outside in (b"http://", b"https://", b"//", b"@import"):
            assert outside not in page.body.replace(b"// A canvas", b"")
        made = (await client("GET", "/openapi.json")).json
        assert made == json.loads(json.dumps(description()))
        paths = {route.path for route in _routes(client)} - {"/", "/openapi.json"}
        assert {path for path in paths if not path.startswith("/v2/")} == set(made["paths"])
        assert "churn" in made["components"]["schemas"]["SampleRequest"]["properties"]


def _routes(client: Client) -> Any:
    return client.app.app.routes


@asynchronous
async def test_openai_requests(tmp_path: Path) -> None:
    path = "/v1/images/generations"
    async with serving(tmp_path, guided()) as (client, _):
        asked = {"prompt": "ant, 2", "n": 2, "seed": 5, "num_inference_steps": "ddim8", "guidance_scale": 1.5}
        reply = await client("POST", path, asked)
        own = {"classes": [0, 0, 2, 2], "seeds": [5, 6, 7, 8], "steps": "ddim8", "scale": 1.5}
        drawn = (await client("POST", SAMPLES, own)).json["images"]
        assert [one["b64_json"] for one in reply.json["data"]] == drawn
        alone = {"n": 1, "prompt": "ant", "num_inference_steps": "ddim250"}
        reply = await client("POST", path, asked | alone | {"stream": True, "partial_images": 3})
        names = [name for name, _ in reply.events]
        assert names[-1] == "image_generation.completed"
        assert 0 < names.count("image_generation.partial_image") <= 3
        own |= {"classes": [0], "seeds": [5], "steps": "ddim250"}
        drawn = (await client("POST", SAMPLES, own)).json["images"]
        assert reply.events[-1][1]["b64_json"] == drawn[0]
        for wrong, status in (
            ({"prompt": "dog"}, 400),
            ({"prompt": "ant", "size": "64x64"}, 400),
            ({"prompt": "ant", "n": 11}, 422),
            ({"prompt": "ant", "response_format": "url"}, 422),
            ({"prompt": "ant", "quality": "high"}, 422),
            ({"prompt": "ant", "partial_images": 2}, 400),
            ({}, 422),
        ):
            assert (await client("POST", path, wrong)).status == status
        assert (await client("POST", path, {"prompt": "bee", "size": "8x8"})).status == 200
