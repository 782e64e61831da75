"""Bad input to the server: errors are reported field by field, and no fuzzed body causes a 500."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Reply, archive, asynchronous, guided, picture, serving

SAMPLES = "/v1/samples"
SEED = 20261130
BLACK = picture(np.zeros((8, 8)))

BAD: list[tuple[Any, int, str]] = [
    (b"", 422, "body: Invalid JSON"),
    (b"{", 422, "body: Invalid JSON"),
    (b"\xff\xfe", 422, "body: Invalid JSON"),
    (b"[" * 10_000, 422, "recursion limit exceeded"),
    (b'{"scale": NaN, "classes": [0]}', 422, "scale: Input should be a finite number"),
    (b'{"scale": 1e999, "classes": [0]}', 422, "scale: Input should be a finite number"),
    ([1], 422, "body: Input should be an object"),
    ({"classes": [0], "stepz": 5}, 422, "stepz: Extra inputs are not permitted"),
    ({"classes": []}, 422, "classes: List should have at least 1 item"),
    ({"classes": [0] * 65}, 422, "classes: List should have at most 64 items"),
    ({"classes": [True]}, 422, "classes.0: Input should be a valid integer"),
    ({"classes": [0], "n": 65}, 422, "n: Input should be less than or equal to 64"),
    ({"classes": [0], "n": 2.0}, 422, "n: Input should be a valid integer"),
    ({"classes": [0], "seeds": [-1]}, 422, "seeds.0: "),
    ({"classes": [0], "seeds": ["1e3"]}, 422, "seeds.0: "),
    ({"classes": [0], "seeds": [2**64]}, 422, "seeds.0: "),
    ({"classes": [0], "seeds": ["99999999999999999999"]}, 400, "seed 99999999999999999999 is out of range"),
    ({"classes": [0], "steps": "ddim5x"}, 422, "steps: "),
    ({"classes": [0], "steps": "1e9"}, 422, "steps: "),
    ({"classes": [0], "steps": "leading:99999"}, 422, "steps: "),
    ({"classes": [0], "steps": "trailing:5+1"}, 400, "trailing"),
    ({"classes": [0], "steps": 10**6}, 422, "steps: "),
    ({"classes": [0], "strength": 0}, 422, "strength: Input should be greater than 0"),
    ({"classes": [0], "timeout": -1}, 422, "timeout: "),
    ({"classes": [0], "order": 4}, 422, "order: "),
    ({"classes": [0], "grid": "log"}, 422, "grid: "),
    ({"classes": [0], "priority": "first"}, 422, "priority: "),
    ({"classes": [0], "preview_every": 5}, 422, "previews come by a stream"),
    ({"classes": [0], "stream": True, "format": "npz"}, 422, "a stream carries png"),
    ({"classes": [0], "known": ["x"]}, 422, "known and mask belong together"),
    ({"classes": [3]}, 400, "class 3 is out of range; the classes are 0 to 2"),
    ({"classes": ["dog"]}, 400, "class 'dog' is neither a number nor a name of the bundle"),
    ({}, 400, "labels are needed"),
    ({"classes": [0], "seeds": [1, 2]}, 400, "2 seeds for 1 samples"),
    ({"n": 2, "classes": [0], "seeds": [1, 2, 3]}, 400, "3 seeds for 2 samples"),
    ({"classes": [0], "steps": "5000"}, 400, "5000"),
    ({"classes": [0], "method": "dmp"}, 400, "'dmp'"),
    ({"classes": [0], "scale": 1e7}, 400, "out of range"),
    ({"classes": [0], "eta": 0.5, "method": "unipc"}, 400, "eta belongs to ddim"),
    ({"classes": [0], "scale": 0, "guidance_interval": [0, 1]}, 400, "nothing is guided"),
    ({"classes": [0], "upsample_steps": 5}, 400, "has no second stage"),
    ({"classes": [0], "low_res": ["x"]}, 400, "'guided' is no upsampler"),
    ({"classes": [0], "init": ["x"], "strength": 1}, 400, "init[0] is not base64"),
    ({"classes": [0], "init": ["aGVsbG8="], "strength": 1}, 400, "cannot read init[0]: it is damaged"),
    ({"classes": [0], "init": [BLACK]}, 400, "there is no strength"),
    ({"classes": [0], "init": [picture(np.zeros((9, 8)))], "strength": 1}, 400, "8x9 pixels; expected 8x8"),
    ({"classes": [0], "init": [picture(np.zeros((8, 8, 3)))], "strength": 1}, 400, "pixels of mode RGB"),
    ({"classes": [0], "init": [picture(np.zeros((8, 8)), "GIF")], "strength": 1}, 400, "cannot read init[0]"),
    ({"classes": [0], "known": [BLACK], "mask": [BLACK]}, 400, "no pixel"),
    ({"classes": [0], "latents": "eA=="}, 400, "cannot read latents as .npz"),
    ({"classes": [0], "latents": archive(latents=np.zeros((1, 1, 8, 8)))}, 400, "latents are float64"),
    ({"classes": [0], "latents": archive(x=np.zeros(1))}, 400, "has no latents"),
    (
        {"classes": [0], "latents": archive(latents=np.zeros((10**6, 1, 8, 8), np.float32))},
        400, "latents holds 256000000 bytes; expected",
    ),
    ({"classes": [0], "latents": archive(latents=np.array([{}], object))}, 400, "cannot read latents"),
    ({"model": "other", "classes": [0]}, 404, "there is no model 'other'"),
]  # fmt: skip


@asynchronous
async def test_bad_input_is_refused_field_by_field(tmp_path: Path) -> None:
    async with serving(tmp_path, guided()) as (client, service):
        for asked, status, message in BAD:
            reply = await client("POST", SAMPLES, asked)
            assert (reply.status, message in reply.error["message"]) == (status, True), (
                asked,
                reply.body[:300],
            )
            assert b"Traceback" not in reply.body
            if status == 422:
                assert reply.error["fields"]
        assert service.engines["guided"].counts["accepted"] == 0
        reply = await client("POST", SAMPLES, {"classes": [3], "a": 1, "b": 2})
        assert {one["field"] for one in reply.error["fields"]} == {"a", "b"}


@asynchronous
async def test_requests_that_are_none(tmp_path: Path) -> None:
    async with serving(tmp_path, guided(), max_body=2000, read_timeout=0.1) as (client, _):
        cases = [
            (await client("POST", SAMPLES, {}, content_type="text/plain"), 415),
            (await client("POST", SAMPLES, b" " * 2001), 413),
            (await client("POST", SAMPLES, b"", content_length="2001"), 413),
            (await client("POST", SAMPLES, b"", content_length="9" * 5000), 413),
            (await client("POST", SAMPLES, {}, slow=5), 408),
            (await client("GET", SAMPLES), 405),
            (await client("GET", "/nowhere"), 404),
            (await client("GET", "/v1/models/other"), 404),
            (await client("GET", "/v1/jobs/other"), 404),
            (await client("GET", "/v1/jobs/..%2f..%2fetc"), 404),
        ]
        for reply, status in cases:
            assert reply.status == status
            assert reply.error["message"]
        assert (await client("POST", SAMPLES, {"classes": [0], "steps": 2})).status == 200


FIELDS: dict[str, list[Any]] = {
    "classes": [[0], [1, 2], ["ant"], ["dog"], [], [-1], [10**9], None, 5, "x", [[0]], [None], [0.5]],
    "n": [1, 3, 0, -1, 64, 10**20, "2", None],
    "seeds": [[1], ["2"], [2**64], ["x"], [], [None], 7],
    "steps": [1, 3, "2", "ddim2", "1,1", "ddim0", "0", "", " ", "9999", "-1", "٣", 2.5, None, [], "ddim1,2"],
    "method": ["ddpm", "ddim", "dpmpp", "unipc", "heun", "euler", "consistency", "auto", "", "x" * 64, 1],
    "scale": [0, 1.5, -2, 1e300, 1e6, "1", True, None],
    "clip": [True, False, None, 1],
    "guidance_interval": [[0.1, 2], [2, 0.1], [1], [1, 2, 3], "x", [0, 0], [-1, 1]],
    "init": [[BLACK], ["AAAA"], [""], [picture(np.zeros((3, 3)))], "x"],
    "strength": [0.5, 1, 1e-9, 0, 2, "1"],
    "known": [[picture(np.ones((8, 8)))], ["zz"]],
    "mask": [[picture(np.eye(8) * 255)], [BLACK], []],
    "known_as_sampled": [True, 0],
    "jump": [[1, 2], [0, 0], [100, 100], [1], "1:2"],
    "reference": [[picture(np.ones((8, 8)))], [1]],
    "low_pass": [2, 4, 3, 1, [2, 1], [2, 99], [2], 8192],
    "latents": [archive(latents=np.ones((1, 1, 8, 8), np.float32)), archive(latents=np.ones(3)), "AA==", ""],
    "order": [1, 2, 3, 4], "form": ["multi", "single", "x"], "sde": [True, "x"], "variant": ["bh1", 2],
    "grid": ["karras", "trained", "logsnr", "quadratic", "respaced", "time_uniform", ""],
    "to": ["zero", "sigma_min"], "denoise_to_zero": [True], "threshold": ["dynamic", "static"],
    "threshold_order": ["after_guide"], "final_order": ["full", "falling"], "sigma": ["rounded"],
    "churn": [[1, 0, 1, 1], [1e308, 0, 1e308, 1e308], [1, 1, 0, 1], [1]], "eta": [0, 1, 2],
    "levels": [[0, 1], [1, 0], [0, 10**9], []], "levels_of": [2, 40, 10**9],
    "upsample_steps": [3], "upsample_scale": [0.0], "low_res": [["x"]],
    "format": ["png", "npz", "gif"], "stream": [True, False], "preview_every": [0, 1, 1000, -1],
    "guides": [{"tv": {}}, {"tv": {"x": "AA=="}}, {}, ["tv"]], "guide_scale": [{"tv": 1.0}, {}, {"tv": None}],
    "guide_interval": [{"tv": [0.1, 2]}], "guide_place": [{"tv": "score"}], "recurrence": [2, 1, 100],
    "priority": ["batch", "interactive"], "timeout": [30, 1e-6, 0], "model": ["guided", "x", None],
    "surprise": [1], "": [None],
}  # fmt: skip


def fuzzed(random_: random.Random) -> bytes:
    names = random_.sample(list(FIELDS), random_.choice([0, 0, 1, 1, 2, 3, 6])) + ["classes"] * (
        random_.random() < 0.8
    )
    body: Any = {name: random_.choice(FIELDS[name]) for name in names}
    if random_.random() < 0.7:
        body.setdefault("steps", 2)
    text = bytearray(json.dumps(body).encode())
    for _ in range(random_.choice([0, 0, 0, 1, 3])):
        place = random_.randint(0, len(text))
        text[place : place + random_.randint(0, 3)] = random_.randbytes(random_.randint(0, 3))
    return bytes(text)


async def fuzz(folder: Path, count: int, seed: int) -> dict[int, int]:
    """Counts by status; no answer may be a fault or show a traceback."""
    random_, statuses = random.Random(seed), dict[int, int]()
    async with serving(folder, guided(), engine={"sizes": (4,)}) as (client, _):

        async def one(body: bytes) -> Reply:
            path = random_.choice([SAMPLES, SAMPLES, SAMPLES, "/v1/jobs", "/v1/images/generations"])
            # Room is reserved by the length; without it most of so many at once would be refused unread.
            return await client("POST", path, body, content_length=str(len(body)))

        for _ in range(0, count, 20):
            bodies = [fuzzed(random_) for _ in range(20)]
            for body, reply in zip(bodies, await asyncio.gather(*map(one, bodies)), strict=True):
                assert reply.status in (200, 202, 400, 404, 413, 422, 429, 504), (
                    reply.status,
                    body,
                    reply.body[:300],
                )
                assert b"Traceback" not in reply.body
                assert b'"code":"fault"' not in reply.body, body
                statuses[reply.status] = statuses.get(reply.status, 0) + 1
    return statuses


def test_fuzzed_bodies_are_answered(tmp_path: Path) -> None:
    statuses = asyncio.run(fuzz(tmp_path, 200, SEED))
    assert {200, 400, 422} <= set(statuses)


@pytest.mark.slow
def test_ten_thousand_fuzzed_bodies_are_answered(tmp_path: Path) -> None:
    statuses = asyncio.run(fuzz(tmp_path, 10_000, SEED + 1))
    assert sum(statuses.values()) == 10_000
