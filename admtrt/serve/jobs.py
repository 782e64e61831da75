"""Jobs: requests that are answered later, submitted as the engines have room."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from admtrt.errors import OutputError
from admtrt.serve.admission import RefusedError
from admtrt.serve.decode import checked_draw
from admtrt.serve.flight import Failed
from admtrt.serve.schema import SampleRequest
from admtrt.serve.service import failure
from admtrt.serve.spool import Spool, StoredJob
from admtrt.serve.web import HttpError, as_http_error, client_of, dump

if TYPE_CHECKING:
    from starlette.requests import Request

    from admtrt.serve.service import Opened, Service
    from admtrt.serve.web import Bodies

_AT_ONCE = 4  # jobs in an engine at once: enough to fill its steps, few enough to leave room in the queue
_RETRY, _SWEEP = 0.5, 60.0  # seconds
_NPZ = "application/x-npz"
_log = logging.getLogger("admtrt.serve")


class Jobs:
    """The jobs of a server.

    Args:
        service: draws the jobs.
        spool: stores the jobs.
        bodies: reads request bodies.
    """

    def __init__(self, service: Service, spool: Spool, bodies: Bodies) -> None:
        self._service, self._spool, self._bodies = service, spool, bodies
        self._waiting: dict[str, list[StoredJob]] = {name: [] for name in service.engines}
        self._running: dict[str, Opened | None] = {}
        self._there = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Draw stored and new jobs until cancelled."""
        for job in await asyncio.to_thread(self._spool.unfinished):
            await self._enqueue(job)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sweep())
            for name in self._waiting:
                for _ in range(_AT_ONCE):
                    group.create_task(self._work(name))

    async def _enqueue(self, job: StoredJob) -> None:
        name = job.request.get("model")
        if name not in self._waiting:
            end = {
                "state": "failed",
                "error": {"code": "unknown_model", "message": f"there is no model {name!r}"},
            }
            await asyncio.to_thread(self._spool.finish, job.id, end)
            return
        self._waiting[name].append(job)
        self._there.set()

    async def _sweep(self) -> None:
        while True:
            await asyncio.to_thread(self._spool.sweep)
            await asyncio.sleep(_SWEEP)

    async def _work(self, name: str) -> None:
        while True:
            while not self._waiting[name]:
                self._there.clear()
                await self._there.wait()
            job = self._waiting[name].pop(0)
            self._running[job.id] = None
            try:
                await self._draw(job)
            except (OutputError, OSError) as error:
                _log.error("job %s could not be stored: %s", job.id, error)
                await asyncio.sleep(_SWEEP)
                self._waiting[name].append(job)
            finally:
                self._running.pop(job.id, None)

    async def _draw(self, job: StoredJob) -> None:
        """Draw a job and store its result. If the server stops, the job is drawn after the restart."""
        try:
            request = SampleRequest.model_validate_json(dump(job.request))
            opened = await self._opened(job, request)
            event = await opened.mailbox.end()
            if isinstance(event, Failed):
                if event.reason in ("cut", "cancelled"):
                    return
                raise failure(event)
            answer = await self._service.answer(opened, event)
            result = dump(answer).encode()
            if request.format == "npz":
                result = await self._service.archive(opened, event)
        except Exception as error:  # one job must not stop the others
            end = {"state": "failed", **as_http_error(error).body}
            await asyncio.to_thread(self._spool.finish, job.id, end)
            return
        await asyncio.to_thread(
            self._spool.finish, job.id, {"state": "done", "timing": answer["timing"]}, result
        )

    async def _opened(self, job: StoredJob, request: SampleRequest) -> Opened:
        while True:
            try:
                opened = await self._service.open(request, job.client, deadline=math.inf)
            except RefusedError:
                await asyncio.sleep(_RETRY)
                continue
            if job.id in self._running:
                self._running[job.id] = opened
            else:
                opened.leave()  # deleted meanwhile
            return opened

    async def post(self, request: Request) -> Response:
        """Accept a job: 202 with its location."""
        sent = await self._bodies.read(request, SampleRequest)
        for name in ("stream", "timeout"):
            if getattr(sent, name):
                raise HttpError(422, "invalid_request", f"a job has no {name}; leave it out")
        if self._spool.full:
            raise HttpError(429, "spool_full", "no further job can be stored", retry_after=60)
        engine = self._service.engine(sent.model)
        loop = asyncio.get_running_loop()
        draw = await loop.run_in_executor(self._service.encoders, checked_draw, sent, engine.model)
        fields = sent.model_dump(mode="json", exclude_unset=True)
        fields["model"], fields["seeds"] = engine.model.name, draw.seeds
        fields.setdefault("priority", "batch")
        job = StoredJob(Spool.new_id(), client_of(request), fields)
        await asyncio.to_thread(self._spool.add, job)
        await self._enqueue(job)
        place = f"/v1/jobs/{job.id}"
        return JSONResponse(
            {"id": job.id, "state": "queued", "seeds": _safe(draw.seeds), "url": place},
            202,
            {"Location": place},
        )

    async def get(self, request: Request) -> Response:
        """Return the state of a job."""
        job = await self._stored(request)
        state: dict[str, Any] = {"state": "queued"}
        if job.end is not None:
            state = job.end
        elif job.id in self._running:
            opened = self._running[job.id]
            if opened is not None and opened.flight.started is not None:
                state = {"state": "running", "step": opened.flight.step, "steps": opened.flight.total}
        return JSONResponse({"id": job.id, "seeds": _safe(job.request["seeds"]), **state})

    async def result(self, request: Request) -> Response:
        """Return the images of a job, in the form of a direct request's answer."""
        job = await self._stored(request)
        if job.end is None:
            raise HttpError(409, "not_done", f"job {job.id} is not done", retry_after=2)
        if job.end["state"] != "done":
            error = job.end.get("error", {})
            raise HttpError(409, error.get("code", "failed"), error.get("message", "the job has failed"))
        content = await asyncio.to_thread(self._spool.result, job.id)
        as_npz = job.request.get("format") == "npz"
        return Response(content, media_type=_NPZ if as_npz else "application/json")

    async def delete(self, request: Request) -> Response:
        """Cancel and delete a job."""
        job = await self._stored(request)
        for waiting in self._waiting.values():
            waiting[:] = [one for one in waiting if one.id != job.id]
        opened = self._running.pop(job.id, None)
        if opened is not None:
            opened.leave()
        await asyncio.to_thread(self._spool.remove, job.id)
        return Response(status_code=204)

    async def _stored(self, request: Request) -> StoredJob:
        """The job in a URL's path, if it belongs to the client.

        Raises:
            HttpError: if the job does not exist or has expired.
        """
        name = request.path_params["job"]
        job = await asyncio.to_thread(self._spool.get, name)
        named = request.scope.get("client_name") is not None
        if job is None or (named and job.client != client_of(request)):
            if self._spool.expired(name):
                raise HttpError(410, "gone", f"job {name[:40]!r} is kept no longer, if there was one")
            raise HttpError(404, "unknown_job", f"there is no job {name[:40]!r}")
        return job


def _safe(seeds: list[int]) -> list[int | str]:
    return [seed if seed < 2**53 else str(seed) for seed in seeds]


async def stopped(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
