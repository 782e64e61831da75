"""Jobs: answered later, given up, kept over a stop and a kill, bounded in time and size."""

from __future__ import annotations

import asyncio
import io
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from serving import Client, Counting, asynchronous, guided, serving, sham_model

from admtrt.serve.spool import Spool, StoredJob

SAMPLES = "/v1/samples"


async def ended(client: Client, place: str) -> Any:
    while (state := (await client("GET", place)).json)["state"] in ("queued", "running"):
        await asyncio.sleep(0.005)
    return state


@asynchronous
async def test_jobs_are_answered_later(tmp_path: Path) -> None:
    async with serving(tmp_path, guided()) as (client, _):
        asked = {"classes": [1, 2], "steps": "ddim5"}
        reply = await client("POST", "/v1/jobs", asked)
        assert reply.status == 202
        place = reply.headers["location"]
        assert (await ended(client, place))["state"] == "done"
        result = (await client("GET", f"{place}/result")).json
        again = await client("POST", SAMPLES, asked | {"seeds": reply.json["seeds"]})
        assert result["images"] == again.json["images"]
        more = asked | {"guidance_interval": [0.5, 5], "jump": None}
        interval = (await client("POST", "/v1/jobs", more)).json
        assert (await ended(client, interval["url"]))["state"] == "done"
        as_npz = (await client("POST", "/v1/jobs", asked | {"format": "npz"})).json
        await ended(client, as_npz["url"])
        with np.load(io.BytesIO((await client("GET", as_npz["url"] + "/result")).body)) as held:
            assert held["arr_0"].shape == (2, 8, 8, 1)
        assert (await client("DELETE", place)).status == 204
        assert (await client("GET", place)).status == 404
        for wrong, status in (
            (asked | {"stream": True}, 422),
            (asked | {"timeout": 5.0}, 422),
            ({"classes": [9]}, 400),
            (asked | {"model": "x"}, 404),
        ):
            assert (await client("POST", "/v1/jobs", wrong)).status == status
        gone = f"{1:08x}-{'0' * 24}"
        assert (await client("GET", f"/v1/jobs/{gone}")).status == 410


@asynchronous
async def test_jobs_can_be_given_up(tmp_path: Path) -> None:
    denoiser = Counting()
    async with serving(tmp_path, sham_model(tmp_path, denoiser)) as (client, service):
        denoiser.gate.clear()
        asked = {"classes": [0], "steps": 100, "scale": 0}
        places = [(await client("POST", "/v1/jobs", asked)).headers["location"] for _ in range(6)]
        while len(service.engines["sham"].flights) < 4:
            await asyncio.sleep(0.001)
        assert (await client("GET", f"{places[0]}/result")).status == 409
        for place in (places[0], places[5]):  # one that is drawn, one that waits
            assert (await client("DELETE", place)).status == 204
        denoiser.gate.set()
        for place in places[1:5]:
            assert (await ended(client, place))["state"] == "done"
        for place in (places[0], places[5]):
            assert (await client("GET", place)).status == 404
        assert not list((tmp_path / "spool").glob(f"{places[0].rpartition('/')[2]}*"))


@asynchronous
async def test_jobs_survive_their_server(tmp_path: Path) -> None:
    denoiser = Counting()
    asked = {"classes": [0], "steps": 50, "scale": 0}
    async with serving(tmp_path, sham_model(tmp_path, denoiser)) as (client, _):
        denoiser.gate.clear()
        places = [(await client("POST", "/v1/jobs", asked)).headers["location"] for _ in range(6)]
        shutil.copytree(tmp_path / "spool", tmp_path / "again" / "spool")  # what a kill at this moment leaves
        denoiser.gate.set()
        results = [
            (await ended(client, place), await client("GET", f"{place}/result"))[1] for place in places
        ]
    async with serving(tmp_path / "again", sham_model(tmp_path / "again")) as (client, _):
        for place, before in zip(places, results, strict=True):
            assert (await ended(client, place))["state"] == "done"
            assert (await client("GET", f"{place}/result")).json["images"] == before.json["images"]


@asynchronous
async def test_jobs_of_a_model_that_is_gone_fail(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool", largest=2**20, keep=60) as spool:
        name = Spool.new_id()
        spool.add(StoredJob(name, "", {"model": "gone", "seeds": [1]}))
    async with serving(tmp_path, sham_model(tmp_path)) as (client, _):
        state = await ended(client, f"/v1/jobs/{name}")
        assert (state["state"], state["error"]["code"]) == ("failed", "unknown_model")
        assert (await client("GET", f"/v1/jobs/{name}/result")).status == 409


@asynchronous
async def test_the_spool_is_bounded(tmp_path: Path) -> None:
    async with serving(tmp_path, sham_model(tmp_path), spool_bytes=200) as (client, _):
        asked = {"classes": [0], "steps": 2, "scale": 0}
        place = (await client("POST", "/v1/jobs", asked)).headers["location"]
        await ended(client, place)
        assert (await client("POST", "/v1/jobs", asked)).status == 429
        await client("DELETE", place)
        assert (await client("POST", "/v1/jobs", asked)).status == 202


def test_what_ended_long_ago_is_forgotten(tmp_path: Path) -> None:
    with Spool(tmp_path, largest=2**20, keep=0.2) as spool:
        ended, open_, orphan = (Spool.new_id() for _ in range(3))
        for name in (ended, open_):
            spool.add(StoredJob(name, "me", {"seeds": [1]}))
        spool.finish(ended, {"state": "done"}, b"images")
        (tmp_path / f"{orphan}.result").write_bytes(b"left by a kill")
        (tmp_path / "notes.txt").write_text("somebody else's")
        time.sleep(0.3)
        spool.sweep()
        assert spool.get(ended) is None
        assert [job.id for job in spool.unfinished()] == [open_]
        assert {file.name for file in tmp_path.iterdir()} == {f"{open_}.request.json", "notes.txt"}
        assert spool.expired(ended)
        assert not spool.expired("nonsense")
