"""``admtrt serve``: serve bundles over HTTP, batching many requests in each step."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from admtrt.commands.backend_report import BackendReport
from admtrt.commands.options import BackendName, PlanFolder, PrecisionName, Threads
from admtrt.console import Output
from admtrt.errors import MissingDependencyError, RequestError
from admtrt.runtime.backends.default import DEFAULT_BACKEND

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Sequence

    from admtrt.bundle import Bundle
    from admtrt.serve.engine import Engine
    from admtrt.serve.model import Model

_GIB = 2**30
_DEFAULT_PORT = 8000
_BACKLOG = 2048
_BODY = 8 * 2**20  # bytes


def serve(
    bundles: Annotated[
        list[Path],
        typer.Argument(
            metavar="BUNDLE...",
            help="Directories of bundles; each is named as its directory, or NAME=BUNDLE.",
        ),
    ],
    upsample: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", help="Enlarge the single bundle's images; both form one model."),
    ] = None,
    guides: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help="Guides to serve besides the classifier; each takes memory. Default: all.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = _DEFAULT_PORT,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File of clients' tokens: NAME TOKEN, one a line. Left out: no token is needed."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name by which clients call this server; may be repeated.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of pages that may send requests, e.g. https://a.example; may be repeated."),
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, max=4096, help="The largest batch to try.")] = 16,
    sizes: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Batch sizes to prepare, instead of measuring.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            metavar="GIB",
            help="Limit for copies of the weights. Default: half of the machine's memory.",
        ),
    ] = None,
    order: Annotated[
        Literal["fair", "shortest", "static", "static-any"],
        typer.Option(
            help="fair: clients take turns at every step. shortest: the least remaining work goes first. "
            "static and static-any, for comparison: a batch (of equal settings, of any) runs to its end."
        ),
    ] = "fair",
    timeout: Annotated[float, typer.Option(min=0.1, help="Time limit of a request, in seconds.")] = 300.0,
    max_requests: Annotated[int, typer.Option(min=1, help="The most requests admitted at once.")] = 256,
    client_share: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=1.0,
            help="Largest fraction of the work within the timeout that one client may queue.",
        ),
    ] = 0.5,
    max_body: Annotated[
        int | None,
        typer.Option(
            min=1024,
            metavar="BYTES",
            help="Largest request. Default: 8 MiB, or more if a sample's guide targets need it.",
        ),
    ] = None,
    read_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to receive a request.")] = 30.0,
    max_connections: Annotated[int, typer.Option(min=2, help="The most connections at once.")] = 1024,
    spool: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder that keeps jobs across restarts; without it they end with the server."
        ),
    ] = None,
    spool_bytes: Annotated[int, typer.Option(min=1, help="Limit of the folder's size.")] = _GIB,
    keep: Annotated[
        float, typer.Option(min=0.001, metavar="HOURS", help="How long finished jobs are kept.")
    ] = 24.0,
    drain_grace: Annotated[
        float,
        typer.Option(min=0, help="Seconds for which a stopping server still answers new requests with 503."),
    ] = 5.0,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds after which a stopping server aborts unfinished work.")
    ] = 300.0,
    backend: BackendName = DEFAULT_BACKEND,
    precision: PrecisionName = "fp32",
    threads: Threads = None,
    plans: PlanFolder = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document when ready.")] = False,
) -> None:
    """Serve bundles over HTTP, with a web page to draw samples; without PyTorch."""
    for package in ("starlette", "uvicorn", "prometheus_client"):
        _need(package)
    from admtrt.bundle import Bundle
    from admtrt.runtime.machine import physical_memory
    from admtrt.serve.admission import Bounds
    from admtrt.serve.app import Access, make_app
    from admtrt.serve.engine import Engine
    from admtrt.serve.metrics import Metrics
    from admtrt.serve.policy import policy_named
    from admtrt.serve.server import Server
    from admtrt.serve.service import Service
    from admtrt.serve.web import Tokens

    output = Output(json=json)
    tokens = Tokens({}) if token_file is None else Tokens.read(token_file)
    named = named_bundles(bundles)
    if upsample is not None and len(named) > 1:
        raise RequestError(f"--upsample belongs to one bundle; there are {len(named)}")
    chosen_sizes = _sizes(sizes)
    chosen_guides = None if guides is None else [name.strip() for name in guides.split(",") if name.strip()]
    budget = physical_memory() // 2 if memory is None else int(memory * _GIB)
    bounds = Bounds(requests=max_requests, timeout=timeout, client_share=client_share)
    found = BackendReport(output)

    def opened(bundle: Bundle) -> Any:
        from admtrt.runtime.pipeline import Pipeline

        return Pipeline.from_bundle(
            bundle,
            backend=backend,
            precision=precision,  # type: ignore[arg-type]
            threads=threads,
            plans=plans,
            batch_size=max_rows if not chosen_sizes else max(chosen_sizes),
            guides=chosen_guides,
            progress=found,
        )

    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(_bound(host, port))
        engines: dict[str, Engine] = {}
        held = {name: Bundle.open(path) for name, path in named.items()}
        larger = None if upsample is None else Bundle.open(upsample)
        _check_guides(chosen_guides or (), held.values())
        models = {
            name: _model(name, opened(bundle), None if larger is None else opened(larger))
            for name, bundle in held.items()
        }
        for name, model in models.items():
            engine = Engine(
                model,
                policy=policy_named(order),
                bounds=bounds,
                max_rows=max_rows,
                memory=budget // len(named),
                sizes=chosen_sizes,
            )
            engine.warm(output.note)
            engines[name] = engine
        kept = stack.enter_context(_spool(spool, spool_bytes, keep * 3600))
        hosts = frozenset(name.lower() for name in (*(allow_host or []), host))
        body = (
            max(_BODY, *(model.target_bytes for model in models.values())) if max_body is None else max_body
        )
        access = Access(tokens, hosts, tuple(allow_origin or []), body, read_timeout)
        app = make_app(Service(engines, Metrics(engines)), kept, access)
        server = Server(
            app,
            list(engines.values()),
            grace=drain_grace,
            timeout=drain_timeout,
            connections=max_connections,
            note=output.note,
        )
        address = listening.getsockname()
        url = f"http://{f'[{address[0]}]' if ':' in address[0] else address[0]}:{address[1]}"
        if not tokens and address[0] not in ("127.0.0.1", "::1"):
            output.note("everybody who reaches this address may draw; --token-file asks for a token")
        listening.listen(_BACKLOG)
        output.result(
            {
                "url": url,
                "models": {
                    name: {"cap": engine.stations[0].sizes.cap, "sizes": engine.stations[0].sizes.prepared}
                    for name, engine in engines.items()
                },
                "chosen": found.to_list(),
            },
            f"serving {', '.join(engines)} at {url}",
        )
        code = server.run_until_done(listening)
    if code:
        raise typer.Exit(code)


def _need(package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MissingDependencyError(package, extra="serve", purpose="Serving")


def _model(name: str, pipeline: Any, upsampler: Any) -> Model:
    from admtrt.serve.model import Model

    return Model(name, pipeline, upsampler)


def _check_guides(names: Sequence[str], bundles: Iterable[Bundle]) -> None:
    """Refuse guides that no bundle has.

    Raises:
        RequestError: naming the first one.
    """
    known = {name for bundle in bundles for name in bundle.manifest.guides}
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise RequestError(
            f"--guides: no bundle has a guide '{unknown}'",
            hint="See: admtrt inspect BUNDLE. Export adds one with --guide.",
        )


def named_bundles(bundles: Sequence[Path]) -> dict[str, Path]:
    """The bundles by name: from NAME=BUNDLE, else the name of the directory.

    Raises:
        RequestError: for a name that is empty, not printable or given twice.
    """
    named: dict[str, Path] = {}
    for given in bundles:
        name, equals, path = str(given).partition("=")
        if equals and "/" not in name:
            place = Path(path)
        else:
            place = given
            name = given.resolve().name
        if not name or not name.isprintable() or "/" in name or len(name) > 200:
            raise RequestError(f"{str(given)!r} gives no name", hint="Write NAME=BUNDLE.")
        if name in named:
            raise RequestError(f"two models are called '{name}'", hint="Write NAME=BUNDLE for one of them.")
        named[name] = place
    return named


def _sizes(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = text.split(",")
    if not all(
        part.strip().isascii() and part.strip().isdigit() and 1 <= int(part) <= 4096 for part in parts
    ):
        raise RequestError(f"--sizes {text[:60]!r} is not of the form N,N,...", hint="E.g. --sizes 1,4,16.")
    return tuple(sorted({int(part) for part in parts}))


def _bound(host: str, port: int) -> socket.socket:
    """Bind a socket without listening yet, so that a used port is reported before anything is compiled.

    Raises:
        RequestError: if the address is not free.
    """
    import socket

    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise RequestError(f"there is no address {host!r}: {error.strerror}") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise RequestError(
            f"cannot listen at {host}:{port}: {error.strerror}",
            hint="Choose another --port, or end who has it.",
        ) from None
    return made


@contextlib.contextmanager
def _spool(folder: Path | None, largest: int, keep: float) -> Any:
    from tempfile import TemporaryDirectory

    from admtrt.serve.spool import Spool

    if folder is not None:
        with Spool(folder, largest=largest, keep=keep) as kept:
            yield kept
        return
    with (
        TemporaryDirectory(prefix="admtrt-jobs-") as made,
        Spool(Path(made), largest=largest, keep=keep) as kept,
    ):
        yield kept
