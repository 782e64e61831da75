"""Inversion over HTTP: images to latents, batched with all other requests."""

from __future__ import annotations

import asyncio
import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.responses import JSONResponse, Response

from admtrt.contract import event_shape
from admtrt.runtime.inversion import DEFAULT_STEPS, InversionRequest
from admtrt.runtime.sampler import runs_of
from admtrt.serve.answers import end_or_leave
from admtrt.serve.decode import pictures
from admtrt.serve.model import Draw
from admtrt.serve.schema import InversionAsked
from admtrt.serve.web import CLIENT_LEFT, client_of

if TYPE_CHECKING:
    from collections.abc import Hashable

    from starlette.requests import Request

    from admtrt.runtime.slots import Images, Slots
    from admtrt.serve.flight import Done
    from admtrt.serve.model import Model
    from admtrt.serve.service import Service
    from admtrt.serve.web import Bodies


@dataclass(frozen=True, eq=False)
class Inversion(Draw):
    """A checked inversion: its rows follow the inversion schedule of the first stage."""

    request: InversionRequest

    def __len__(self) -> int:
        return len(self.request)

    @property
    def seeds(self) -> list[int]:
        """None: inversion is deterministic."""
        return []

    @property
    def labels(self) -> list[int] | None:
        """The label of every row, if the network knows classes."""
        return None if self.request.labels is None else self.request.labels.tolist()

    @property
    def settings(self) -> Hashable:
        """See :class:`Draw`."""
        return self.request.sampler, self.steps

    def slots(self, stage: int, index: int, small: Images | None) -> Slots:  # noqa: ARG002 - there is one stage
        """The initial state of one row: its image."""
        return self.request.slots(slice(index, index + 1))

    def finished(self, stage: int, index: int, x: Images) -> Images:  # noqa: ARG002
        """One row's latent, float32 [C, H, W].

        Raises:
            RequestError: if it is too large or not finite.
        """
        latent: Images = self.request.finished(x[None])[0]
        return latent


def checked_inversion(asked: InversionAsked, model: Model) -> Inversion:
    """Check a request against a model and make its inversion.

    Raises:
        RequestError: for anything that the model cannot do.
    """
    pipeline = model.pipelines[0]
    manifest = pipeline.bundle.manifest
    request = InversionRequest.checked(
        pipeline,
        pictures(asked.images, "images", event_shape(manifest.network)),
        asked.classes,
        steps=DEFAULT_STEPS if asked.steps is None else asked.steps,
        levels=asked.levels,
        clip=asked.clip,
        batch_size=1,
    )
    schedule = request.schedule
    return Inversion(
        [pipeline], [], steps=(len(schedule),), runs=(runs_of(schedule, manifest.guides),), request=request
    )


async def invert(service: Service, bodies: Bodies, request: Request) -> Response:
    """``POST /v1/inversions``: returns the file of ``admtrt invert``, raw or as base64 in JSON."""
    asked = await bodies.read(request, InversionAsked)
    opened = await service.open(asked, client_of(request), draw_of=checked_inversion)
    done = await end_or_leave(request, opened)
    if done is None:
        return Response(status_code=CLIENT_LEFT)
    draw = opened.flight.draw
    assert isinstance(draw, Inversion)
    loop = asyncio.get_running_loop()
    content = await loop.run_in_executor(service.encoders, _written, draw.request, done)
    told: dict[str, Any] = {name: value for name, value in opened.meta.items() if name != "seeds"}
    told["timing"] = service.timing(opened, done)
    if asked.format == "npz":
        return Response(content, media_type="application/x-npz", headers={"X-Request-Id": told["id"]})
    return JSONResponse({**told, "latents": base64.b64encode(content).decode("ascii")})


def _written(request: InversionRequest, done: Done) -> bytes:
    file = io.BytesIO()
    request.latents(np.stack(done.images), slice(None)).write(file)
    return file.getvalue()
