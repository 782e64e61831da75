"""Helpers of the server's tests: an engine without a network, a client without a socket."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from bundles import pipeline, sham_bundle
from PIL import Image

from admtrt.errors import EngineError
from admtrt.runtime.pipeline import Pipeline
from admtrt.serve.app import Access, make_app
from admtrt.serve.engine import Engine
from admtrt.serve.flight import Flight, Preview
from admtrt.serve.metrics import Metrics
from admtrt.serve.model import Model
from admtrt.serve.service import Service
from admtrt.serve.spool import Spool
from admtrt.serve.web import Tokens

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from admtrt.serve.flight import Done, Event, Failed


class Counting:
    """A denoiser that reduces x by a tenth per step and records every run.

    Attributes:
        runs: graph and batch size of each run.
        gate: steps wait until it is set.
        fails: called with the values of x in a run of the UNet; the run fails if it returns true.
        spoils: called with the x of a row; the row becomes NaN if it returns true.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[str, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fails: Any = lambda _: False
        self.spoils: Any = lambda x: np.zeros(len(x), bool)

    def run(self, graph: str, feeds: Any) -> dict[str, Any]:
        x = feeds["x_prev" if graph.startswith("edit") else "x"]
        if x.any():  # not during the warm-up
            self.gate.wait(10)
            self.runs.append((graph, len(x)))
            if graph == "unet" and self.fails(x):
                raise EngineError("the library refuses", hint="Give it less.")
        y = np.where(self.spoils(x)[:, None, None, None], np.float32("nan"), x * np.float32(0.9))
        return {
            "out": np.concatenate([y, y], axis=1),
            "grad": np.zeros_like(y),
            "r": np.ones(len(x), np.float32),
        } | dict.fromkeys(("x_prev", "pred_x0", "saved_next", "x_edited"), y)


def sham_model(folder: Path, denoiser: Any = None, name: str = "sham", **fields: Any) -> Model:
    """A model whose steps compute almost nothing."""
    return Model(name, Pipeline(sham_bundle(folder / name, **fields), denoiser or Counting()))


@contextlib.contextmanager
def running(model: Model, **options: Any) -> Iterator[Engine]:
    """A running engine of a model; it is stopped at the end."""
    engine = Engine(model, **{"sizes": (4,)} | options)
    engine.warm()
    engine.start()
    try:
        yield engine
    finally:
        engine.abort()
        engine.join(60)
        assert not engine.is_alive()


class Asked:
    """A request to an engine, and its events."""

    def __init__(
        self,
        engine: Engine,
        labels: Any = (0,),
        seeds: Any = None,
        *,
        more: Any = MappingProxyType({}),
        **options: Any,
    ) -> None:
        own = {
            name: options.pop(name)
            for name in ("client", "priority", "deadline", "preview_every")
            if name in options
        }
        seeds = list(range(len(labels))) if seeds is None else seeds
        labels = None if labels is None else list(labels)
        draw = engine.model.draw(labels, seeds, choices=options, **more)  # type: ignore[arg-type]
        self.events: list[Event] = []
        self._ended = threading.Event()
        self.flight = Flight(draw, self._notify, **own)
        self.expected = engine.submit(self.flight)

    def _notify(self, event: Event) -> None:
        self.events.append(event)
        if not isinstance(event, Preview):
            self._ended.set()

    def end(self, timeout: float = 120) -> Done | Failed:
        assert self._ended.wait(timeout), "the request has no end"
        return self.events[-1]  # type: ignore[return-value]

    @property
    def ended(self) -> bool:
        return self._ended.is_set()


@dataclass
class Reply:
    """A response of the server."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]  # type: ignore[no-any-return]

    @property
    def events(self) -> list[tuple[str, Any]]:
        """The events of a stream, by name."""
        parts = [part for part in self.body.decode().split("\n\n") if part.startswith("event: ")]
        return [
            (head[7:], json.loads(data[6:])) for head, _, data in (part.partition("\n") for part in parts)
        ]


class Client:
    """Calls an ASGI application in the running loop."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        leave: Any = None,
        slow: float = 0,
        peer: str = "127.0.0.1",
        **headers: str,
    ) -> Reply:
        """Send a request, its body after ``slow`` seconds; the client disconnects when ``leave`` is done."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        given = {"host": "localhost", "content-type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        parts: list[dict[str, Any]] = []
        sent = False

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if not sent:
                sent = True
                await asyncio.sleep(slow)
                return {"type": "http.request", "body": content, "more_body": False}
            if leave is None:
                await asyncio.Event().wait()
            await leave()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            parts.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": method, "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
            "root_path": "", "headers": [(k.encode(), v.encode()) for k, v in given.items()],
            "client": (peer, 1), "server": ("127.0.0.1", 8000),
        }  # fmt: skip
        await self.app(scope, receive, send)
        start = next((part for part in parts if part["type"] == "http.response.start"), {"status": 0})
        return Reply(
            start["status"],
            {k.decode(): v.decode() for k, v in start.get("headers", [])},
            b"".join(part.get("body", b"") for part in parts),
        )


@contextlib.asynccontextmanager
async def serving(
    folder: Path, *models: Model, tokens: Any = None, keep: float = 3600, spool_bytes: int = 2**24,
    engine: Any = None, **access: Any,
) -> AsyncIterator[tuple[Client, Service]]:  # fmt: skip
    """A server of models without a socket; yields its client."""
    with contextlib.ExitStack() as stack:
        engines = {model.name: stack.enter_context(running(model, **(engine or {}))) for model in models}
        service = Service(engines, Metrics(engines))
        spool = stack.enter_context(Spool(folder / "spool", largest=spool_bytes, keep=keep))
        app = make_app(service, spool, Access(Tokens(tokens or {}), **access))
        stop, started = asyncio.Event(), asyncio.Event()

        async def receive() -> dict[str, Any]:
            if started.is_set():
                await stop.wait()
                return {"type": "lifespan.shutdown"}
            return {"type": "lifespan.startup"}

        async def send(message: dict[str, Any]) -> None:
            assert message["type"] in ("lifespan.startup.complete", "lifespan.shutdown.complete"), message
            started.set()

        life = asyncio.create_task(app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send))
        await started.wait()
        try:
            yield Client(app), service
        finally:
            stop.set()
            await life
            service.encoders.shutdown()


def asynchronous(test: Any) -> Any:
    """Turn a coroutine function into a test."""

    def wrapped(tmp_path: Path) -> None:
        asyncio.run(asyncio.wait_for(test(tmp_path), 300))

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped


def picture(pixels: Any, kind: str = "PNG") -> str:
    written = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(written, kind)
    return base64.b64encode(written.getvalue()).decode()


def archive(**arrays: Any) -> str:
    written = io.BytesIO()
    np.savez_compressed(written, **arrays)
    return base64.b64encode(written.getvalue()).decode()


def opened(text: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def guided() -> Model:
    return Model("guided", pipeline("guided"))
