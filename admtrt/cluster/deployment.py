"""``admtrt serve`` as a deployment of Ray Serve, with one engine per replica.

``serve run admtrt.cluster.deployment:application bundle=/models/digits`` starts it, :func:`application` in
Python.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from admtrt.errors import MissingDependencyError, RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

_BESIDE = 32  # additional requests that draw nothing: health, metrics, states of jobs
_SPOOL, _KEEP = 2**30, 86400.0  # bytes, seconds: the defaults of admtrt serve


class Settings(BaseModel):
    """Settings of the served models; fields are options of ``admtrt serve``.

    Attributes:
        bundle: directory of the bundle, at the same path on every node.
        name: name of the model; by default the name of the directory.
        backend, precision, threads, max_rows, timeout, max_requests, client_share: as there; a replica
            reserves ``threads`` CPUs (default 1) and ``gpus`` GPUs.
        hosts: host names of the service, separated by commas.
        token_file: file of the clients' tokens, on every node.
        replicas: number of engines. Jobs need a single replica, because only the replica that has a job can
            answer for it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: Path
    name: str = ""
    backend: str = "onnxruntime"
    precision: str = "fp32"
    threads: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0
    max_rows: Annotated[int, Field(ge=1, le=4096)] = 16
    timeout: Annotated[float, Field(ge=0.1)] = 300.0
    max_requests: Annotated[int, Field(ge=1)] = 256
    client_share: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    hosts: str = ""
    token_file: Path | None = None
    replicas: Annotated[int, Field(ge=1)] = 1
    drain_timeout: Annotated[float, Field(ge=0)] = 300.0


class Replica:
    """One process of the service: an engine behind the HTTP application.

    Args:
        settings: the deployment's settings.

    Raises:
        UserError: from opening the bundle and warming the engine.
    """

    def __init__(self, settings: Settings) -> None:
        from admtrt.runtime.pipeline import Pipeline
        from admtrt.serve.admission import Bounds
        from admtrt.serve.engine import Engine
        from admtrt.serve.metrics import Metrics
        from admtrt.serve.model import Model
        from admtrt.serve.service import Service
        from admtrt.serve.spool import Spool

        self._settings, self._held = settings, ExitStack()
        pipeline = Pipeline.from_bundle(
            settings.bundle,
            backend=settings.backend,
            precision=settings.precision,  # type: ignore[arg-type]
            threads=settings.threads,
            batch_size=settings.max_rows,
        )
        model = Model(settings.name or settings.bundle.resolve().name, pipeline)
        bounds = Bounds(settings.max_requests, settings.timeout, settings.client_share)
        self._engine = Engine(model, bounds=bounds, max_rows=settings.max_rows)
        self._engine.warm()
        self._engine.start()
        engines = {model.name: self._engine}
        self._service = Service(engines, Metrics(engines))
        folder = self._held.enter_context(TemporaryDirectory(prefix="admtrt-jobs-"))
        self._spool = self._held.enter_context(Spool(Path(folder), largest=_SPOOL, keep=_KEEP))

    def __serve_build_asgi_app__(self) -> Any:
        """Build the application in the replica's event loop."""
        from admtrt.serve.app import Access, make_app
        from admtrt.serve.web import Tokens

        file = self._settings.token_file
        tokens = Tokens({}) if file is None else Tokens.read(file)
        hosts = frozenset(name.strip().lower() for name in self._settings.hosts.split(",") if name.strip())
        return make_app(self._service, self._spool, Access(tokens, hosts))

    def check_health(self) -> None:
        """Raise if the engine has failed, so that Ray replaces this replica.

        Raises:
            RuntimeError: if the engine has failed.
        """
        if not self._service.live:
            raise RuntimeError(f"the engine has failed: {self._engine.fault}")

    def __del__(self) -> None:
        """Shut down. Ray waits for admitted requests first."""
        engine = getattr(self, "_engine", None)
        if engine is not None and engine.is_alive():
            engine.abort()
            engine.join(5)
            self._held.close()


def application(args: Settings | Mapping[str, Any]) -> Any:
    """Make the application for ``ray.serve.run``.

    Args:
        args: the settings, or their fields as given to ``serve run``.

    Raises:
        RequestError: for invalid settings.
        MissingDependencyError: if Ray Serve is not installed.
    """
    if not isinstance(args, Settings):
        try:
            args = Settings.model_validate(dict(args))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise RequestError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    try:
        from ray import serve
    except ImportError:
        raise MissingDependencyError(
            "ray[serve]", extra="ray-serve", purpose="Serving on a cluster"
        ) from None
    deployment = serve.deployment(
        name="admtrt",
        num_replicas=args.replicas,
        # Excess requests should be refused by the engine's admission, not wait in Ray's queue.
        max_ongoing_requests=args.max_requests + _BESIDE,
        graceful_shutdown_timeout_s=args.drain_timeout,
        ray_actor_options={"num_cpus": args.threads, "num_gpus": args.gpus},
    )
    return deployment(serve.ingress()(Replica)).bind(args)
