"""The engine in Triton's Python backend: a decoupled model that answers each request when it is done.

Tensors are passed through DLPack only: with NumPy 2, ``as_numpy`` of a backend built for NumPy 1 silently
returns wrong numbers. A round trip at the start checks that DLPack works.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from admtrt.errors import AdmtrtError, EngineError, RequestError
from admtrt.images import to_uint8
from admtrt.runtime.pipeline import Pipeline
from admtrt.serve.admission import Bounds, RefusedError
from admtrt.serve.decode import checked_draw
from admtrt.serve.encode import base64_png
from admtrt.serve.engine import Engine
from admtrt.serve.flight import Done, Failed, Flight, Preview
from admtrt.serve.model import Model
from admtrt.serve.schema import MAX_IMAGES, SampleRequest, faults_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admtrt.runtime.slots import Images
    from admtrt.serve.flight import Event

PREVIEWS = "preview_every"
"""Request parameter: evaluations between previews."""
PICTURES = ("low_res", "init")
"""Inputs of images, uint8 [N, H, W, C]: fields of a request that are base64 PNG elsewhere."""
_TRIAL = np.array([[3, 1, 4], [1, 5, 9]], np.int64)
_COUNTS = ("accepted", "done", "cancelled", "expired", "fault", "steps", "rows")


class TritonModel:
    """The object that Triton calls; ``model.py`` of a repository makes one.

    Args:
        pb: the module ``triton_python_backend_utils``.
    """

    def __init__(self, pb: Any) -> None:
        self._pb = pb
        self._live: dict[int, tuple[Flight, Any]] = {}
        self._guard = threading.Lock()

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle and start the engine.

        Raises:
            AdmtrtError: if the bundle cannot be opened, or tensors arrive corrupted.
        """
        self._check_tensors()
        told = json.loads(args["model_config"]).get("parameters", {})
        given = {name: value["string_value"] for name, value in told.items()}
        pipeline = Pipeline.from_bundle(
            Path(args["model_repository"]) / "bundle",
            backend=given["backend"],
            precision=given["precision"],
            threads=int(given["threads"]) if "threads" in given else None,
            batch_size=int(given["max_rows"]),
            guides=(),  # Triton's configuration has no tensors for their targets
        )
        self._engine = Engine(
            Model(args["model_name"], pipeline),
            bounds=Bounds(timeout=float(given["timeout"]), client_share=1.0),
            max_rows=int(given["max_rows"]),
        )
        self._engine.warm(self._pb.Logger.log_info)
        self._metrics = self._made_metrics(args["model_name"])
        self._engine.step_seconds = lambda *_: self._after_step()
        self._engine.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Submit requests; each is answered through its own sender."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._open(request, sender)
            except RefusedError as refusal:
                self._refuse(sender, "UNAVAILABLE", refusal.message)
            except ValidationError as error:
                told = "; ".join(f"{one['field']}: {one['message']}" for one in faults_of(error))
                self._refuse(sender, "INVALID_ARG", told)
            except AdmtrtError as error:
                self._refuse(sender, "INVALID_ARG", f"{error.message} {error.hint}".strip())
            except Exception as error:  # the client must get an answer
                self._pb.Logger.log_error(f"{type(error).__name__}: {error}")
                self._refuse(sender, "INTERNAL", "something failed in the model; the log tells more")

    def finalize(self) -> None:
        """Finish the admitted requests."""
        self._engine.drain()
        self._engine.join()

    def _open(self, request: Any, sender: Any) -> None:
        fields: dict[str, Any] = json.loads(request.parameters() or "{}")
        fields = {name: value for name, value in fields.items() if name in SampleRequest.model_fields}
        every = int(fields.pop(PREVIEWS, 0))
        labels, seeds = self._tensor(request, "label"), self._tensor(request, "seed")
        if labels is not None:
            fields["classes"] = labels.ravel().tolist()
        if seeds is not None:
            fields["seeds"] = seeds.ravel().tolist()
        for name in PICTURES:
            if (images := self._tensor(request, name)) is not None:
                fields[name] = _encoded(name, images)
        asked = SampleRequest.model_validate(fields)
        draw = checked_draw(asked, self._engine.model)
        deadline = None if asked.timeout is None else time.monotonic() + asked.timeout

        def notify(event: Event) -> None:
            self._answer(flight, sender, event)

        flight = Flight(draw, notify, priority=asked.priority, deadline=deadline, preview_every=every)
        with self._guard:
            self._live[flight.id] = (flight, sender)
        try:
            self._engine.submit(flight)
        except RefusedError:
            self._forget(flight)
            raise

    def _answer(self, flight: Flight, sender: Any, event: Event) -> None:
        if isinstance(event, Preview):
            shown = [x for x in event.images if x is not None]
            if len({x.shape for x in shown}) == 1 and len(shown) == len(event.images):
                sender.send(self._response(shown, event.step))
            return
        self._forget(flight)
        if isinstance(event, Done):
            sender.send(
                self._response(event.images, flight.total),
                flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
            )
        elif isinstance(event, Failed):
            codes = {
                "cancelled": "CANCELLED",
                "expired": "UNAVAILABLE",
                "cut": "UNAVAILABLE",
                "refused": "INVALID_ARG",
            }
            self._refuse(sender, codes.get(event.reason, "INTERNAL"), f"{event.message} {event.hint}".strip())

    def _after_step(self) -> None:
        with self._guard:
            live = list(self._live.values())
        for flight, sender in live:
            if sender.is_cancelled():
                self._engine.cancel(flight)
        for name, (_, metric) in self._metrics.items():
            metric.set(self._engine.counts[name])

    def _forget(self, flight: Flight) -> None:
        with self._guard:
            self._live.pop(flight.id, None)

    def _response(self, images: Sequence[Images], step: int) -> Any:
        pb = self._pb
        pixels = np.ascontiguousarray(to_uint8(np.stack(images)))
        return pb.InferenceResponse(
            [
                pb.Tensor.from_dlpack("images", pixels),
                pb.Tensor.from_dlpack("step", np.array([step], np.int32)),
            ]
        )

    def _refuse(self, sender: Any, code: str, message: str) -> None:
        pb = self._pb
        error = pb.TritonError(message, getattr(pb.TritonError, code))
        sender.send(pb.InferenceResponse(error=error), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _tensor(self, request: Any, name: str) -> Any:
        tensor = self._pb.get_input_tensor_by_name(request, name)
        return None if tensor is None else np.array(np.from_dlpack(tensor))

    def _check_tensors(self) -> None:
        back = np.from_dlpack(self._pb.Tensor.from_dlpack("trial", _TRIAL.copy()))
        if not np.array_equal(back, _TRIAL):
            raise EngineError(
                f"this Triton's Python backend gives {back.tolist()} for {_TRIAL.tolist()}",
                hint="Use a Triton whose Python backend is built for this NumPy.",
            )

    def _made_metrics(self, model: str) -> dict[str, tuple[Any, Any]]:
        """The metrics, each with its family, which must stay alive as long."""
        family = self._pb.MetricFamily
        made = {}
        for name in _COUNTS:
            gauges = family(name=f"admtrt_{name}", description=f"Engine: {name}", kind=family.GAUGE)
            made[name] = (gauges, gauges.Metric(labels={"model": model}))
        return made


def _encoded(name: str, images: Any) -> list[str]:
    """Images as the request's field has them, so that all clients' images go through the same checks.

    Raises:
        RequestError: if these are no images.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        shape = ",".join(map(str, images.shape))
        raise RequestError(f"{name} is {images.dtype} [{shape}]; expected uint8 [N,H,W,C] with C 1 or 3")
    if len(images) > MAX_IMAGES:
        raise RequestError(f"{name} has {len(images)} images; at most {MAX_IMAGES} fit into a request")
    return [base64_png(pixels) for pixels in images]
