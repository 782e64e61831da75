"""Answers to an admitted request: at its end, or as events. A client that disconnects cancels it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from admtrt.serve.flight import Failed, Preview
from admtrt.serve.service import failure
from admtrt.serve.web import CLIENT_LEFT, as_http_error, dump

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from admtrt.serve.flight import Done
    from admtrt.serve.service import Opened, Service

_ALIVE = 10.0  # seconds between keep-alive messages: clients time out on silence
_NPZ = "application/x-npz"


async def _left(receive: Receive) -> None:
    """Wait until the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def end_or_leave(request: Request, opened: Opened) -> Done | None:
    """Wait for the end of a request. If the client disconnects first, cancel it and return None.

    Raises:
        HttpError: if it could not be finished.
    """
    end = asyncio.ensure_future(opened.mailbox.end())
    left = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({end, left}, return_when=asyncio.FIRST_COMPLETED)
        if not end.done():
            return None
        event = end.result()
    finally:
        opened.leave()
        for task in (end, left):
            task.cancel()
    if isinstance(event, Failed):
        raise failure(event)
    return event


async def whole(service: Service, request: Request, opened: Opened, *, as_npz: bool) -> Response:
    """Answer when all images are drawn, with JSON or npz."""
    done = await end_or_leave(request, opened)
    if done is None:
        return Response(status_code=CLIENT_LEFT)
    answer = await service.answer(opened, done)
    if not as_npz:
        return JSONResponse(answer)
    seeds = ",".join(map(str, answer["seeds"]))
    return Response(
        await service.archive(opened, done),
        media_type=_NPZ,
        headers={"X-Seeds": seeds, "X-Request-Id": answer["id"]},
    )


class EventStream(Response):
    """Server-sent events until a request ends or its client disconnects.

    Args:
        opened: the admitted request.
        events: converts the engine's events to named data.
        first: an event that is sent at once.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        opened: Opened,
        events: Callable[[Preview | Done], AsyncIterator[tuple[str, dict[str, Any]]]],
        *,
        first: tuple[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._opened, self._events, self._first = opened, events, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """ASGI."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        writing = asyncio.ensure_future(self._write(send))
        left = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({writing, left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._opened.leave()
            left.cancel()
            writing.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await writing

    async def _write(self, send: Send) -> None:
        async def say(text: str, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        if self._first is not None:
            await say(_event(*self._first))
        while True:
            try:
                async with asyncio.timeout(_ALIVE):
                    event = await self._opened.mailbox.get()
            except TimeoutError:
                await say(": alive\n\n")
                continue
            try:
                if isinstance(event, Failed):
                    raise failure(event)
                async for name, data in self._events(event):
                    await say(_event(name, data))
            except OSError:
                raise
            except Exception as error:  # too late for an HTTP status: the response has begun
                await say(_event("error", as_http_error(error).body), more=False)
                return
            if not isinstance(event, Preview):
                await say("", more=False)
                return


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {dump(data)}\n\n"
