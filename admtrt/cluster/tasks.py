"""Pieces of work as Ray tasks. Each writes its own file, so repeating one does no harm.

Tasks, not actors: an actor whose node is lost may wait forever for a suitable node; a task can run anywhere.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
from typing import TYPE_CHECKING, Any, Protocol

from admtrt.errors import AdmtrtError, EngineError, MissingDependencyError, RequestError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_AHEAD = 4  # submitted tasks per worker: enough to keep it busy, few enough to move elsewhere
_PATIENCE = 10.0  # seconds to wait for a connection
LOCAL = "local"
"""The address that starts a temporary cluster on this machine."""


class Work(Protocol):
    """A picklable function of a piece of work, from an importable module.

    It writes its result to a file, atomically, and does nothing if the file exists.
    """

    def __call__(self, piece: int, /) -> int:
        """Do a piece of work, and return the piece."""
        ...


def spread(work: Work, pieces: Sequence[int], *, address: str, cpus: int, gpus: float = 0) -> Iterator[int]:
    """Run pieces on the cluster, and yield each when done, in any order.

    A piece whose worker or node is lost is repeated without limit. A piece that raises ends the run.

    Args:
        work: the work to do.
        pieces: the pieces.
        address: Ray's address of a cluster (``auto``, ``HOST:PORT``), or :data:`LOCAL`.
        cpus, gpus: resources of each task.

    Raises:
        MissingDependencyError: if Ray is not installed.
        EngineError: if there is no cluster, or it can never run such a task.
        AdmtrtError: raised by a piece.
    """
    ray = _import_ray()
    _check_reachable(address)
    # Ray reports lost workers on stdout, which is reserved for results.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                include_dashboard=False if address == LOCAL else None,
                configure_logging=False,
            )
        except Exception as error:  # Ray raises types of its own
            raise EngineError(
                f"cannot join the Ray cluster {address!r}: {' '.join(str(error).split())[:300]}",
                hint=f"Start one as Ray's documentation says, or use --ray {LOCAL}.",
            ) from None
        try:
            yield from _results(ray, work, pieces, cpus, gpus)
        finally:
            ray.shutdown()


def _results(ray: Any, work: Work, pieces: Sequence[int], cpus: int, gpus: float) -> Iterator[int]:
    held = ray.cluster_resources()
    places = int(held.get("CPU", 0) // cpus)
    if gpus:
        places = min(places, int(held.get("GPU", 0) // gpus))
    if places < 1:
        raise RequestError(
            f"no node of the cluster has {cpus} CPUs" + (f" and {gpus:g} GPUs" if gpus else ""),
            hint="Give --threads fewer.",
        )
    task = ray.remote(num_cpus=cpus, num_gpus=gpus or None, max_retries=-1, scheduling_strategy="SPREAD")(_do)
    shared = ray.put(work)
    waiting = iter(pieces)
    flying = [task.remote(shared, piece) for piece in itertools.islice(waiting, places * _AHEAD)]
    while flying:
        ready, flying = ray.wait(flying, num_returns=1)
        for one in ready:
            piece, fault = ray.get(one)
            if fault is not None:
                raise _error(*fault)
            yield piece
        flying += [task.remote(shared, piece) for piece in itertools.islice(waiting, len(ready))]


def _do(work: Work, piece: int) -> tuple[int, tuple[bool, str, str] | None]:
    """Run a piece. Return, not raise, foreseen errors: Ray would wrap the exception."""
    try:
        return work(piece), None
    except AdmtrtError as error:
        return piece, (isinstance(error, UserError), error.message, error.hint)


def _error(users: bool, message: str, hint: str) -> AdmtrtError:
    return (UserError if users else AdmtrtError)(message, hint=hint)


def _check_reachable(address: str) -> None:
    """Refuse an address where nothing listens; Ray itself would take minutes to notice.

    Raises:
        EngineError: naming the address.
    """
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address or not port.isdecimal():
        return  # a name for Ray
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE):
            pass
    except (OSError, OverflowError) as error:
        raise EngineError(
            f"cannot join the Ray cluster {address!r}: {getattr(error, 'strerror', None) or error}",
            hint=f"Start one as Ray's documentation says, or use --ray {LOCAL}.",
        ) from None


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise MissingDependencyError("ray", extra="ray", purpose="--ray") from None
    return ray
