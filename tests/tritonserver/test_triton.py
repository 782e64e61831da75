"""A real tritonserver without a GPU, on a repository that ``admtrt triton`` wrote: draws, cancels, drains."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from bundles import exported_bundle, pipeline

from admtrt.cli import run

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.triton
ENVIRONMENT = Path(os.environ.get("ADMTRT_TRITON", "nowhere"))
"""The virtual environment that `make test-triton` fills: nvidia-pytriton's binaries and tritonclient."""
PATIENCE = 120  # seconds


class Triton:
    """A server on a repository."""

    def __init__(self, folder: Path) -> None:
        assert (
            run(
                [
                    "triton",
                    f"tiny={exported_bundle('guided')}",
                    f"up={exported_bundle('upsampler')}",
                    "--out",
                    str(folder / "repo"),
                    "--threads",
                    "1",
                ]
            )
            == 0
        )
        packages = next(ENVIRONMENT.glob("lib/python*/site-packages"))
        binaries = packages / "pytriton" / "tritonserver"
        shutil.copytree(binaries / "backends", folder / "backends")
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        shutil.copy(
            binaries / "python_backend_stubs" / version / "triton_python_backend_stub",
            folder / "backends" / "python",
        )
        self.http, self.grpc, metrics = (_free_port() for _ in range(3))
        places = [packages / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
        options = {
            "model-repository": folder / "repo", "backend-directory": folder / "backends",
            "http-address": "127.0.0.1", "http-port": self.http,
            "grpc-address": "127.0.0.1", "grpc-port": self.grpc,
            "metrics-address": "127.0.0.1", "metrics-port": metrics, "allow-gpu-metrics": "false",
            "exit-timeout-secs": 60,
        }  # fmt: skip
        self.metrics = f"http://127.0.0.1:{metrics}/metrics"
        self.log = folder / "log"
        libraries = os.pathsep.join(map(str, places))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    binaries / "bin" / "tritonserver",
                    *(f"--{name}={value}" for name, value in options.items()),
                ],
                env=os.environ | {"LD_LIBRARY_PATH": libraries, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        limit = time.monotonic() + PATIENCE
        while self.get("/v2/health/ready")[0] != 200:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < limit, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def get(self, path: str, body: Any = None) -> tuple[int, str]:
        content = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.http}{path}", content, timeout=PATIENCE
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def counted(self, name: str) -> float:
        with urllib.request.urlopen(self.metrics, timeout=PATIENCE) as answer:
            lines = answer.read().decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"admtrt_{name}{{"))

    def stream(self, *requests: Any, **options: Any) -> Any:
        """Over gRPC, by the real client."""
        command = [
            ENVIRONMENT / "bin" / "python",
            Path(__file__).with_name("client.py"),
            f"127.0.0.1:{self.grpc}",
        ]
        done = subprocess.run(
            list(map(str, command)),
            input=json.dumps({"requests": requests, **options}),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE * 2,
        )
        assert done.returncode == 0, done.stderr[-3000:] + self.log.read_text()[-3000:]
        return json.loads(done.stdout)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    assert ENVIRONMENT.exists(), "ADMTRT_TRITON names no environment; run `make test-triton`"
    server = Triton(tmp_path_factory.mktemp("triton"))
    yield server
    if server.process.poll() is None:
        server.process.kill()
        server.process.wait()


def request(labels: list[int], seeds: list[int], **parameters: Any) -> dict[str, Any]:
    return {"model": "tiny", "inputs": {"label": labels, "seed": seeds}, "parameters": parameters}


def assert_near(images: Any, expected: np.ndarray[Any, Any]) -> None:
    """Within a level: graphs of other batch sizes round otherwise."""
    assert np.abs(np.ravel(images).astype(int) - expected.ravel()).max() <= 1


def test_images_are_those_of_the_pipeline(triton: Triton) -> None:
    """Requests of all kinds at once, with previews on the way."""
    kinds: list[dict[str, Any]] = [
        {"steps": "ddim10", "scale": 2.0},
        {"steps": "5"},
        {"method": "dpmpp", "steps": "6"},
    ]
    requests = [
        request([number % 3, 1], [number, 2**63 + number], preview_every=4, **kinds[number % 3])
        for number in range(9)
    ]
    for one, answer in zip(requests, triton.stream(*requests), strict=True):
        chosen = {name: value for name, value in one["parameters"].items() if name != "preview_every"}
        expected = pipeline("guided")(*one["inputs"].values(), **chosen).images
        assert_near(answer["images"], expected)
        assert answer["steps"][:-1] == list(range(4, answer["steps"][-1], 4))


def test_images_to_begin_at_and_to_enlarge(triton: Triton) -> None:
    generator = np.random.default_rng(0)
    init, small = (generator.integers(0, 256, (2, size, size, 1), np.uint8) for size in (8, 4))
    begun: dict[str, Any] = {"steps": "ddim10", "strength": 0.5}
    first = request([0, 2], [5, 6], **begun)
    first["inputs"]["init"] = init.tolist()
    second = {
        "model": "up",
        "inputs": {"seed": [7, 8], "low_res": small.tolist()},
        "parameters": {"steps": "4"},
    }
    answers = triton.stream(first, second)
    assert_near(answers[0]["images"], pipeline("guided")([0, 2], [5, 6], init=init, **begun).images)
    assert_near(answers[1]["images"], pipeline("upsampler")(None, [7, 8], low_res=small, steps="4").images)
    first["inputs"]["init"] = init[:, 1:].tolist()
    assert "init[0]" in triton.stream(first)[0]["error"]


def test_http_and_its_stream(triton: Triton) -> None:
    asked = {"label": [2], "seed": [4], "steps": "ddim10", "scale": 1.5}
    status, body = triton.get("/v2/models/tiny/generate", asked)
    expected = pipeline("guided")([2], [4], steps="ddim10", scale=1.5).images
    assert status == 200
    assert_near(json.loads(body)["images"], expected)
    status, body = triton.get("/v2/models/tiny/generate_stream", {**asked, "preview_every": 2})
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: ")]
    assert [event["step"] for event in events] == [2, 4, 6, 8, 10]
    assert_near(events[-1]["images"], expected)


def test_faults_are_told(triton: Triton) -> None:
    """This Triton answers 400 for every code; a gRPC stream only transports the message."""
    for parameters, label, message in (
        ({}, 7, "class 7 is out of range"),
        ({"steps": "ddim9x"}, 1, "steps: "),
        ({"timeout": 1e-9}, 1, "the request would be done in"),
    ):
        asked = {"label": [label], "seed": [1], **parameters}
        status, body = triton.get("/v2/models/tiny/generate", asked)
        assert (status, message in body) == (400, True), body
        if "timeout" not in parameters:  # which the client keeps for Triton's own
            (answer,) = triton.stream(request([label], [1], **parameters))
            assert message in answer["error"], answer


def test_who_leaves_frees_the_place(triton: Triton) -> None:
    before = triton.counted("cancelled")
    triton.stream(request([0] * 8, list(range(8)), steps="1000", preview_every=1), leave_after=3, linger=1)
    limit = time.monotonic() + PATIENCE
    while triton.counted("cancelled") == before:
        triton.stream(request([1], [1], steps="2"))
        assert time.monotonic() < limit


def test_sigterm_finishes_what_is_in(triton: Triton) -> None:
    answers: list[Any] = []
    long = request([0, 1], [5, 6], steps="200", scale=1.0)
    asking = threading.Thread(target=lambda: answers.extend(triton.stream(long)))
    done = triton.counted("steps")
    asking.start()
    while triton.counted("steps") == done:
        assert asking.is_alive(), answers
        time.sleep(0.02)
    triton.process.send_signal(signal.SIGTERM)
    asking.join(PATIENCE)
    expected = pipeline("guided")([0, 1], [5, 6], steps="200", scale=1.0).images
    assert_near(answers[0]["images"], expected)
    assert triton.process.wait(PATIENCE) == 0
