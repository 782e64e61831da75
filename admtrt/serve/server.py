"""The server process: sockets, signals and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence
    from types import FrameType

    from starlette.types import ASGIApp

    from admtrt.serve.engine import Engine

_HEADERS = 16 * 2**10  # bytes
_LOOK = 0.05  # seconds between checks whether all work is done
_LAST_WORDS = 2.0  # seconds to send finished answers
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
FAILED = 3
"""Exit code of a server whose engine has failed."""


class Server(uvicorn.Server):
    """Serves until a signal; then refuses new work, finishes accepted work, and exits.

    During ``grace`` the socket still listens: clients that do not know yet that the server is stopping get
    503 instead of a refused connection. A second signal aborts the remaining work.

    Args:
        app: the application.
        engines: the engines to drain.
        grace: minimum time for which new requests get 503, in seconds.
        timeout: seconds after which remaining work is aborted.
        connections: the most connections at once.
    """

    def __init__(
        self,
        app: ASGIApp,
        engines: Sequence[Engine],
        *,
        grace: float,
        timeout: float,
        connections: int,
        note: Callable[[str], None],
    ) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=_HEADERS,
            limit_concurrency=connections,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=max(1, round(_LAST_WORDS)),
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="on",
        )
        super().__init__(config)
        self._engines, self._grace, self._timeout, self._note = engines, grace, timeout, note
        self._signalled = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """The first signal drains, the second aborts."""
        self._signalled += 1
        if self._signalled > 1:
            for engine in self._engines:
                engine.abort()
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        began = time.monotonic()
        for engine in self._engines:
            engine.drain()
        self._note("draining: no new requests are taken")
        while any(engine.is_alive() for engine in self._engines):
            if time.monotonic() - began > self._timeout:
                for engine in self._engines:
                    engine.abort()
            await asyncio.sleep(_LOOK)
        if self._signalled < 2:
            await asyncio.sleep(max(0.0, self._grace - (time.monotonic() - began)))
        self.should_exit = True

    async def _watch(self) -> None:
        """Exit when an engine has failed, so that the supervisor restarts the process."""
        while not any(engine.fault for engine in self._engines):
            await asyncio.sleep(_LOOK * 4)
        self._begin_drain()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._loop = asyncio.get_running_loop()
        watching = asyncio.create_task(self._watch())
        try:
            await super().serve(sockets)
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    def run_until_done(self, listening: socket.socket) -> int:
        """Serve on a listening socket; returns the exit code: 0, 1 if work was aborted, 3 after a fault."""
        for engine in self._engines:
            engine.start()
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        try:
            asyncio.run(self.serve([listening]))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for engine in self._engines:
                engine.abort()
                engine.join()
        if any(engine.fault for engine in self._engines):
            return FAILED
        return int(any(engine.counts["cut"] for engine in self._engines))
