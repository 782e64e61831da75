"""The routes of the server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from admtrt import __version__
from admtrt.schedule.options import OPTIONS
from admtrt.schedule.solvers import SOLVERS
from admtrt.serve.answers import EventStream, whole
from admtrt.serve.flight import Preview
from admtrt.serve.inversions import invert
from admtrt.serve.jobs import Jobs, stopped
from admtrt.serve.openai import generations
from admtrt.serve.openapi import description
from admtrt.serve.schema import MAX_IMAGES, SampleRequest
from admtrt.serve.web import Bodies, Guard, Tokens, answering, as_http_error, client_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from starlette.requests import Request
    from starlette.types import ASGIApp

    from admtrt.serve.engine import Engine
    from admtrt.serve.flight import Done
    from admtrt.serve.service import Service
    from admtrt.serve.spool import Spool


@dataclass(frozen=True)
class Access:
    """Access rules: accepted senders, and their limits.

    Attributes:
        tokens: the clients' tokens; empty if none is required.
        hosts: names of the server, besides localhost and addresses.
        origins: origins of other sites' pages that may send requests (CORS).
        max_body: largest request body, in bytes.
        read_timeout: seconds to receive a body.
    """

    tokens: Tokens
    hosts: frozenset[str] = frozenset()
    origins: tuple[str, ...] = ()
    max_body: int = 8 * 2**20
    read_timeout: float = 30.0


def make_app(service: Service, spool: Spool, access: Access) -> ASGIApp:
    """Make the application: :class:`Guard` in front of Starlette."""
    bodies = Bodies(access.max_body, access.read_timeout)
    jobs = Jobs(service, spool, bodies)
    routes = _Routes(service, bodies)

    def counted(request: Request, status: int) -> None:
        route = request.scope.get("route")
        service.metrics.requests.labels(getattr(route, "path", "other"), str(status)).inc()

    def route(path: str, handler: Any, method: str = "GET") -> Route:
        return Route(path, answering(handler, counted), methods=[method])

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        drawing = asyncio.create_task(jobs.run())
        yield
        await stopped(drawing)

    app: ASGIApp = Starlette(
        routes=[
            route("/v1/samples", routes.samples, "POST"),
            route("/v1/inversions", partial(invert, service, bodies), "POST"),
            route("/v1/jobs", jobs.post, "POST"),
            route("/v1/jobs/{job}", jobs.get),
            route("/v1/jobs/{job}", jobs.delete, "DELETE"),
            route("/v1/jobs/{job}/result", jobs.result),
            route("/v1/models", routes.models),
            route("/v1/models/{name}", routes.model),
            route("/v1/images/generations", partial(generations, service, bodies), "POST"),
            *(route(f"{prefix}/health/live", routes.live) for prefix in ("", "/v2")),
            *(route(f"{prefix}/health/ready", routes.ready) for prefix in ("", "/v2")),
            route("/metrics", routes.metrics),
            route("/openapi.json", routes.openapi),
            route("/", routes.page),
        ],
        exception_handlers={HTTPException: _refused, Exception: _refused},
        lifespan=lifespan,
    )
    if access.origins:
        app = CORSMiddleware(
            app,
            allow_origins=access.origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["retry-after", "location", "x-seeds", "x-request-id"],
        )
    return Guard(app, access.tokens, access.hosts)


async def _refused(_: Request, error: Exception) -> Response:
    return as_http_error(error).response


class _Routes:
    def __init__(self, service: Service, bodies: Bodies) -> None:
        self._service, self._bodies = service, bodies
        html = files("admtrt.serve").joinpath("page.html").read_text(encoding="utf-8")
        self._page = HTMLResponse(html, headers=_page_headers(html))

    async def samples(self, request: Request) -> Response:
        asked = await self._bodies.read(request, SampleRequest)
        opened = await self._service.open(asked, client_of(request))
        if not asked.stream:
            return await whole(self._service, request, opened, as_npz=asked.format == "npz")

        async def events(event: Preview | Done) -> AsyncIterator[tuple[str, dict[str, Any]]]:
            if isinstance(event, Preview):
                images = await self._service.pictures(event.images)
                yield "preview", {"step": event.step, "images": images}
            else:
                yield "done", await self._service.answer(opened, event)

        return EventStream(opened, events, first=("accepted", opened.meta))

    async def models(self, _: Request) -> Response:
        listed = [_described(engine) for engine in self._service.engines.values()]
        return JSONResponse({"object": "list", "data": listed})

    async def model(self, request: Request) -> Response:
        return JSONResponse(_described(self._service.engine(request.path_params["name"])))

    async def live(self, _: Request) -> Response:
        return JSONResponse({"live": self._service.live}, 200 if self._service.live else 500)

    async def ready(self, _: Request) -> Response:
        return JSONResponse({"ready": self._service.ready}, 200 if self._service.ready else 503)

    async def metrics(self, _: Request) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(description())

    async def page(self, _: Request) -> Response:
        return self._page


def _described(engine: Engine) -> dict[str, Any]:
    """Describe a model: its images, the supported options, and its recommendation."""
    model = engine.model
    manifest = model.pipelines[0].bundle.manifest
    height, width, channels = model.image_shape
    kind = manifest.diffusion.kind
    takes_images = manifest.network.low_res_size
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": f"admtrt {__version__}",
        "digest": model.digest,
        "classes": model.num_classes,
        "class_names": list(model.class_names),
        "image": {"height": height, "width": width, "channels": channels},
        "low_res": None if takes_images is None else {"height": takes_images, "width": takes_images},
        "stages": len(model.pipelines),
        "guided": manifest.classifier is not None,
        "sampler": manifest.sampler.to_dict(),
        "recommendation": manifest.recommendation,
        "methods": [name for name, solver in SOLVERS.items() if kind in solver.processes],
        "options": list(OPTIONS),
        "guides": {
            name: {
                **guide.to_dict(),
                "network": None,
                "targets": {target: list(sizes) for target, sizes in guide.targets.items()},
            }
            for name, guide in model.guides.items()
        },
        "edits": [graph for graph in ("edit", "edit_low_pass") if graph in manifest.graphs],
        "max_images": MAX_IMAGES,
        "batch": {"cap": engine.stations[0].sizes.cap, "sizes": list(engine.stations[0].sizes.prepared)},
    }


def _page_headers(html: str) -> dict[str, str]:
    """Headers whose content security policy allows only the page's own scripts and styles, by hash."""

    def hashes(tag: str) -> str:
        found: Sequence[str] = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = {
        "default-src": "'none'",
        "script-src": hashes("script"),
        "style-src": hashes("style"),
        "img-src": "data: blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
