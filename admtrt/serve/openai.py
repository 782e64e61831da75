"""``/v1/images/generations`` for OpenAI's clients. Unsupported parameters are refused, not ignored."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from admtrt.errors import RequestError
from admtrt.serve.answers import EventStream, end_or_leave
from admtrt.serve.flight import Preview
from admtrt.serve.schema import MAX_IMAGES, ImageRequest, SampleRequest
from admtrt.serve.web import CLIENT_LEFT, client_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

    from admtrt.serve.flight import Done
    from admtrt.serve.model import Model
    from admtrt.serve.service import Service
    from admtrt.serve.web import Bodies


async def generations(service: Service, bodies: Bodies, request: Request) -> Response:
    """Answer one request."""
    asked = await bodies.read(request, ImageRequest)
    model = service.engine(asked.model).model
    sample = _translated(asked, model)
    previews = asked.partial_images or 0
    if asked.stream and previews:
        draw_steps = await _steps(service, sample)
        sample = sample.model_copy(update={"preview_every": max(1, draw_steps // (previews + 1))})
    opened = await service.open(sample, client_of(request))
    size = "x".join(map(str, model.image_shape[1::-1]))
    shared = {"created_at": int(time.time()), "size": size, "output_format": "png", "quality": "auto"}
    shared["background"] = "opaque"
    if not asked.stream:
        done = await end_or_leave(request, opened)
        if done is None:
            return Response(status_code=CLIENT_LEFT)
        images = (await service.answer(opened, done))["images"]
        data = [{"b64_json": image} for image in images]
        return JSONResponse(
            {"created": shared["created_at"], "data": data, "size": size, "output_format": "png"}
        )
    shown = 0

    async def events(event: Preview | Done) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        nonlocal shown
        kind = "partial_image" if isinstance(event, Preview) else "completed"
        if kind == "partial_image" and shown >= previews:
            return
        for image in await service.pictures(event.images):
            data: dict[str, Any] = {"type": f"image_generation.{kind}", "b64_json": image, **shared}
            if kind == "partial_image":
                data["partial_image_index"] = shown
            else:
                data["usage"] = {"total_tokens": 0, "input_tokens": 0, "output_tokens": 0}
            if image is not None:
                yield data["type"], data
        shown += 1

    return EventStream(opened, events)


async def _steps(service: Service, sample: SampleRequest) -> int:
    from admtrt.serve.decode import checked_draw

    return sum(checked_draw(sample, service.engine(sample.model).model).steps)


def _translated(asked: ImageRequest, model: Model) -> SampleRequest:
    """Translate the request to a :class:`SampleRequest`.

    Raises:
        RequestError: for anything that the model cannot do.
    """
    height, width, _ = model.image_shape
    if asked.size not in (None, "auto", f"{width}x{height}"):
        raise RequestError(f"size is {asked.size!r}; model '{model.name}' draws {width}x{height}")
    if asked.partial_images and not asked.stream:
        raise RequestError("partial_images come by a stream", hint="Set stream, or leave them out.")
    names = [part.strip() for part in asked.prompt.split(",")]
    if model.num_classes is None:
        raise RequestError(
            f"model '{model.name}' knows no classes, so that a prompt means nothing",
            hint="Use /v1/samples.",
        )
    classes: list[int | str] = [
        int(name) if name.isascii() and name.isdigit() and name not in model.class_names else name
        for name in names
        for _ in range(asked.n or 1)
    ]
    if len(classes) > MAX_IMAGES:
        raise RequestError(f"{len(classes)} images; expected {MAX_IMAGES} at most")
    fields: dict[str, Any] = {"model": model.name, "classes": classes, "stream": bool(asked.stream)}
    if asked.seed is not None:
        fields["seeds"] = [(int(asked.seed) + index) % 2**64 for index in range(len(classes))]
    if asked.num_inference_steps is not None:
        fields["steps"] = asked.num_inference_steps
    if asked.guidance_scale is not None:
        fields["scale"] = asked.guidance_scale
    return SampleRequest.model_validate(fields)
