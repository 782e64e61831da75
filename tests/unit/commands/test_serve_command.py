"""``admtrt serve`` as a process: without PyTorch, over a socket, stopped and killed; bad options."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from bundles import sham_bundle
from limited import ROOT
from server_process import start_server

from admtrt.cli import run

if TYPE_CHECKING:
    from collections.abc import Iterator

TRAINING = ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "accelerate", "sklearn", "matplotlib")


class Server:
    """A server process."""

    def __init__(self, folder: Path, *options: Any) -> None:
        (folder / "sitecustomize.py").write_text(
            f"import sys\nfor name in {TRAINING}:\n    sys.modules[name] = None\n"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
        self.process, self.told = start_server(
            "--sizes", 2, *options, stderr=subprocess.PIPE, env=environment
        )

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.told["url"] + path, content, {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=180) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        return self.process.wait(180), self.process.communicate()[1]


@contextlib.contextmanager
def served(folder: Path, *options: Any) -> Iterator[Server]:
    server = Server(folder, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


def test_a_server_from_start_to_end(tmp_path: Path) -> None:
    """Without PyTorch. After SIGTERM, accepted requests are finished and new ones refused."""
    with served(tmp_path, "--drain-grace", "1") as server:
        assert server.told["models"] == {"guided": {"cap": 2, "sizes": [2]}}
        status, answer = server.ask("/v1/samples", {"classes": ["ant"], "seeds": [1], "steps": 3})
        assert (status, answer["seeds"], len(answer["images"])) == (200, [1], 1)
        got: list[Any] = []
        asked = {"classes": [1, 2, 0], "steps": "1000"}
        asking = threading.Thread(target=lambda: got.append(server.ask("/v1/samples", asked)))
        asking.start()
        while 'requests_in_flight{model="guided"} 1.0' not in metrics(server):
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        while server.ask("/health/ready")[0] != 503:
            time.sleep(0.01)
        assert server.ask("/v1/samples", asked)[0] == 503
        asking.join(180)
        assert got[0][0] == 200
        assert len(got[0][1]["images"]) == 3
        assert server.process.wait(180) == 0
        errors = server.process.communicate()[1]
        assert "draining" in errors
        assert "Traceback" not in errors


def test_openais_own_client(tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    with served(tmp_path, "--drain-grace", "0") as server:
        with openai.OpenAI(base_url=server.told["url"] + "/v1", api_key="none", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["guided"]
            more = {"seed": 1, "num_inference_steps": "ddim10", "guidance_scale": 2}
            drawn = client.images.generate(model="guided", prompt="bee", size="8x8", extra_body=more)
            asked = {"classes": ["bee"], "seeds": [1], "steps": "ddim10", "scale": 2}
            same = server.ask("/v1/samples", asked)[1]["images"]
            assert [image.b64_json for image in drawn.data] == same
            stream = client.images.generate(
                model="guided", prompt="bee", stream=True, partial_images=2, extra_body=more
            )
            events = list(stream)
            assert events[-1].type == "image_generation.completed"
            assert events[-1].b64_json == same[0]
            with pytest.raises(openai.BadRequestError, match="dog"):
                client.images.generate(model="guided", prompt="dog")
            with pytest.raises(openai.NotFoundError):
                client.images.generate(model="other", prompt="bee")
        assert server.stop()[0] == 0


def metrics(server: Server) -> str:
    with urllib.request.urlopen(server.told["url"] + "/metrics", timeout=180) as answer:
        return str(answer.read().decode())


def test_a_second_signal_cuts_off(tmp_path: Path) -> None:
    with served(tmp_path, "--drain-grace", "0") as server:
        got: list[Any] = []
        asked = {"classes": [0] * 64, "steps": "1000"}
        asking = threading.Thread(target=lambda: got.append(server.ask("/v1/samples", asked)))
        asking.start()
        while 'requests_in_flight{model="guided"} 1.0' not in metrics(server):
            time.sleep(0.01)
        server.process.send_signal(signal.SIGINT)
        while server.ask("/health/ready")[0] != 503:
            time.sleep(0.01)
        code, errors = server.stop(signal.SIGINT)
        asking.join(180)
        assert (got[0][0], got[0][1]["error"]["code"]) == (503, "draining")
        assert code == 1
        assert "Traceback" not in errors


@pytest.mark.slow
def test_jobs_survive_kill_9(tmp_path: Path) -> None:
    asked = {"classes": [1, 2], "steps": "100"}
    options = ("--spool", tmp_path / "spool")
    with served(tmp_path, *options) as server:
        jobs = [server.ask("/v1/jobs", asked)[1] for _ in range(5)]
        while server.ask(jobs[0]["url"])[1]["state"] == "queued":
            time.sleep(0.005)
        server.process.kill()
        server.process.wait()
    with served(tmp_path, *options, "--drain-grace", "0") as server:
        for job in jobs:
            while server.ask(job["url"])[1]["state"] in ("queued", "running"):
                time.sleep(0.01)
            status, result = server.ask(job["url"] + "/result")
            assert (status, result["seeds"]) == (200, job["seeds"])
        again = server.ask("/v1/samples", asked | {"seeds": jobs[0]["seeds"]})[1]
        assert again["images"] == server.ask(jobs[0]["url"] + "/result")[1]["images"]
        assert server.stop()[0] == 0


def test_bad_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = sham_bundle(tmp_path / "sham.bundle").path
    short = tmp_path / "tokens"
    short.write_text("# of the team\nalice short\n")
    empty = tmp_path / "none"
    empty.write_text("\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, message in (
            ((tmp_path / "nothing",), "does not exist"),
            ((bundle, f"sham.bundle={bundle}"), "two models are called 'sham.bundle'"),
            ((bundle, f"b={bundle}", "--upsample", bundle), "--upsample belongs to one bundle"),
            ((bundle, "--sizes", "1,x"), "is not of the form N,N"),
            ((bundle, "--guides", "tv"), "--guides: no bundle has a guide 'tv'"),
            ((bundle, "--sizes", "0"), "is not of the form N,N"),
            ((bundle, "--backend", "none"), "backend 'none' is unknown"),
            ((bundle, "--token-file", tmp_path / "absent"), "No such file"),
            ((bundle, "--token-file", short), "line 2: expected NAME TOKEN"),
            ((bundle, "--token-file", empty), "holds no token"),
            ((bundle, "--host", "no such host"), "there is no address"),
            ((bundle, "--port", port), "cannot listen at 127.0.0.1"),
        ):
            assert run(["serve", *map(str, arguments)]) == 2
            errors = capsys.readouterr().err
            assert message in errors, errors
            assert "Traceback" not in errors
