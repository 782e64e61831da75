"""The service on Ray Serve: images of the pipeline, streams, refusals, leaving, a replica that is lost."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from bundles import exported_bundle, pipeline
from PIL import Image

from admtrt.cluster.deployment import application
from admtrt.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.ray
ASKED = {"classes": [1, 2], "seeds": [1, 2], "steps": "ddim10", "scale": 2.0}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    import ray
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        "local",  # never a cluster that somebody else runs on this machine
        num_cpus=3,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application({"bundle": str(exported_bundle("guided")), "max_rows": "4"}))
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


def ask(url: str, path: str, body: Any = None) -> tuple[int, str]:
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, content, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def counted(url: str, name: str) -> float:
    lines = [line for line in ask(url, "/metrics")[1].splitlines() if line.startswith(f"{name}{{")]
    return float(lines[0].rpartition(" ")[2])


def test_images_are_those_of_the_pipeline(url: str) -> None:
    status, text = ask(url, "/v1/samples", ASKED)
    assert status == 200, text
    drawn = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in json.loads(text)["images"]]
    expected = pipeline("guided")([1, 2], [1, 2], steps="ddim10", scale=2.0).images[..., 0]
    assert np.abs(np.stack(drawn).astype(int) - expected).max() <= 1
    assert ask(url, "/health/ready")[0] == 200


def test_streams_and_refusals(url: str) -> None:
    status, text = ask(url, "/v1/samples", {**ASKED, "steps": "ddim250", "stream": True, "preview_every": 50})
    assert status == 200
    assert text.startswith("event: accepted")
    assert "event: done" in text
    status, text = ask(url, "/v1/samples", {"classes": [9]})
    assert (status, json.loads(text)["error"]["code"]) == (400, "bad_request")
    assert ask(url, "/v1/samples", {"classes": [0], "stepz": 1})[0] == 422


def test_whoever_leaves_gives_the_request_up(url: str) -> None:
    before = counted(url, "admtrt_cancelled_total")
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    body = json.dumps({"classes": [0] * 16, "steps": "1000", "stream": True})
    connection.request("POST", "/v1/samples", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    assert b"accepted" in answer.readline()
    answer.close()
    connection.close()
    for _ in range(200):
        if counted(url, "admtrt_cancelled_total") > before:
            return
        time.sleep(0.05)
    raise AssertionError("its rows are still drawn")


def test_a_replica_that_is_lost_is_replaced(url: str) -> None:
    killed = 0
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if place.name.isdigit() and b"ServeReplica:" in (place / "cmdline").read_bytes():
                os.kill(int(place.name), signal.SIGKILL)
                killed += 1
    assert killed == 1
    for _ in range(120):
        with contextlib.suppress(OSError, http.client.HTTPException):
            if ask(url, "/v1/samples", ASKED)[0] == 200:
                return
        time.sleep(0.5)
    raise AssertionError("the service did not come back")


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong, message in (({}, "bundle: Field required"), ({"bundle": "b", "max_row": 1}, "max_row: Extra")):
        with pytest.raises(RequestError, match=message):
            application(wrong)
