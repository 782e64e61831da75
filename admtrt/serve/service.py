"""Between HTTP and the engines: submit requests, receive events. Usable without HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from admtrt.serve.decode import checked_draw
from admtrt.serve.encode import base64_sample, npz
from admtrt.serve.flight import Done, Failed, Flight, Preview
from admtrt.serve.web import CLIENT_LEFT, HttpError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from admtrt.runtime.slots import Images
    from admtrt.serve.engine import Engine
    from admtrt.serve.flight import Event
    from admtrt.serve.metrics import Metrics
    from admtrt.serve.model import Draw, Model
    from admtrt.serve.schema import InversionAsked, SampleRequest

_STATUS = {"cancelled": CLIENT_LEFT, "expired": 504, "cut": 503, "fault": 500, "refused": 400}
_CODE = {"refused": "bad_request", "cut": "draining"}
_AGAIN = 5.0  # seconds


class Mailbox:
    """The events of one request. For slow readers only the newest preview is kept."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._there = asyncio.Event()
        self._preview: Preview | None = None
        self._end: Done | Failed | None = None

    def notify(self, event: Event) -> None:
        """Put an event in, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, so nobody reads
            self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event) -> None:
        if isinstance(event, Preview):
            self._preview = event
        else:
            self._end = event
        self._there.set()

    async def get(self) -> Event:
        """Wait for the next event. Done or Failed is the last."""
        await self._there.wait()
        if self._end is not None:
            return self._end
        preview, self._preview = self._preview, None
        self._there.clear()
        assert preview is not None
        return preview

    async def end(self) -> Done | Failed:
        """Wait for the last event."""
        while True:
            event = await self.get()
            if not isinstance(event, Preview):
                return event


class Opened:
    """An admitted request.

    Attributes:
        engine, flight: the engine that draws it, and its flight there.
        mailbox: its events.
        meta: fields of the answer that are known from the start.
    """

    def __init__(self, engine: Engine, flight: Flight, mailbox: Mailbox) -> None:
        self.engine, self.flight, self.mailbox = engine, flight, mailbox
        draw = flight.draw
        self.meta: dict[str, Any] = {
            "id": f"{engine.model.name}-{flight.id}",
            "model": engine.model.name,
            "seeds": [seed if seed < 2**53 else str(seed) for seed in draw.seeds],
            "classes": draw.labels,
            "steps": flight.total,
        }

    def leave(self) -> None:
        """Cancel it if it is not done."""
        self.engine.cancel(self.flight)


class Service:
    """The models of a server.

    Args:
        engines: engines by model name.
        metrics: the server's metrics.
    """

    def __init__(self, engines: Mapping[str, Engine], metrics: Metrics) -> None:
        self.engines = engines
        self.metrics = metrics
        self.encoders = ThreadPoolExecutor(2, thread_name_prefix="encode")
        for name, engine in engines.items():
            engine.step_seconds = _recorder(metrics, name)

    @property
    def ready(self) -> bool:
        """True if every model accepts requests."""
        return all(engine.ready for engine in self.engines.values())

    @property
    def live(self) -> bool:
        """True if no engine has failed."""
        return not any(engine.fault for engine in self.engines.values())

    def engine(self, name: str | None) -> Engine:
        """The engine of a model. With a single model, the name may be omitted.

        Raises:
            HttpError: if there is no such model.
        """
        if name is None and len(self.engines) == 1:
            return next(iter(self.engines.values()))
        if name is None or name not in self.engines:
            raise HttpError(
                404,
                "unknown_model",
                "no model is named" if name is None else f"there is no model {name!r}",
                hint=f"Models: {', '.join(self.engines)}.",
            )
        return self.engines[name]

    async def open(
        self,
        request: SampleRequest | InversionAsked,
        client: str,
        *,
        deadline: float | None = None,
        draw_of: Callable[[Any, Model], Draw] = checked_draw,
    ) -> Opened:
        """Check and admit a request.

        Args:
            request: a request of the schema.
            client: name of the client.
            deadline: in the engine's clock, in place of the request's timeout.
            draw_of: checks the request and makes its draw.

        Raises:
            HttpError, RequestError, RefusedError: if the model cannot do it, or refuses it for now.
        """
        engine = self.engine(request.model)
        loop = asyncio.get_running_loop()
        draw = await loop.run_in_executor(self.encoders, draw_of, request, engine.model)
        mailbox = Mailbox()
        if deadline is None and request.timeout is not None:
            deadline = time.monotonic() + request.timeout
        flight = Flight(
            draw,
            mailbox.notify,
            client=client,
            priority=request.priority,
            deadline=deadline,
            preview_every=getattr(request, "preview_every", 0),
        )
        engine.submit(flight)
        return Opened(engine, flight, mailbox)

    async def answer(self, opened: Opened, done: Done) -> dict[str, Any]:
        """The answer to a finished request: images and metadata."""
        timing = self.timing(opened, done)
        return {**opened.meta, "images": await self.pictures(done.images), "timing": timing}

    def timing(self, opened: Opened, done: Done) -> dict[str, float]:
        """The durations of a request, for the answer and the metrics."""
        name = opened.engine.model.name
        self.metrics.request_seconds.labels(name).observe(done.queued + done.drawn)
        self.metrics.queue_seconds.labels(name).observe(done.queued)
        return {"queued": round(done.queued, 4), "drawn": round(done.drawn, 4)}

    async def pictures(self, images: Sequence[Images | None]) -> list[str | None]:
        """Base64 PNG of each image; None for missing ones."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self.encoders, lambda: [None if one is None else base64_sample(one) for one in images]
        )

    async def archive(self, opened: Opened, done: Done) -> bytes:
        """The images as npz."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.encoders, npz, done.images, opened.flight.draw.labels)


def failure(failed: Failed) -> HttpError:
    """The error response of an admitted request that failed."""
    return HttpError(
        _STATUS[failed.reason],
        _CODE.get(failed.reason, failed.reason),
        failed.message,
        hint=failed.hint,
        retry_after=_AGAIN if failed.reason == "cut" else None,
    )


def _recorder(metrics: Metrics, name: str) -> Any:
    children: dict[int, Any] = {}

    def record(seconds: float, size: int, _: int) -> None:
        if size not in children:
            children[size] = metrics.step_seconds.labels(name, str(size))
        children[size].observe(seconds)

    return record
