"""Pieces of work as Ray tasks: each writes its own file, so that one that is done twice is there once.

Tasks, not actors: an actor whose node is lost can wait for ever for another that fits, a task goes anywhere.
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

_AHEAD = 4  # tasks a worker that are handed out: enough to keep it busy, few enough to go elsewhere
_PATIENCE = 10.0  # seconds for a connection
LOCAL = "local"
"""The address by which Ray starts a cluster on this machine, for as long as the work takes."""


class Work(Protocol):
    """A function of a piece that can be pickled and belongs to an importable module.

    It leaves its result in a file, whole or not at all, and does nothing where that is there.
    """

    def __call__(self, piece: int, /) -> int:
        """Do a piece; returns it."""
        ...


def spread(work: Work, pieces: Sequence[int], *, address: str, cpus: int, gpus: float = 0) -> Iterator[int]:
    """Do pieces wherever the cluster has room, and yield each when it is done, in any order.

    A piece whose worker or node is lost is done again, without end; one that fails by itself ends the run.

    Args:
        work: what is done.
        pieces: of it.
        address: of a cluster as Ray has them (``auto``, ``HOST:PORT``), or :data:`LOCAL`.
        cpus, gpus: of each task.

    Raises:
        MissingDependencyError: if Ray is not installed.
        EngineError: if there is no cluster, or it cannot run such a task.
        AdmtrtError: the fault of a piece.
    """
    ray = _import_ray()
    _check_reachable(address)
    # Ray tells of lost workers on stdout, which is for results.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                include_dashboard=False if address == LOCAL else None,
                configure_logging=False,
            )
        except Exception as error:  # it raises types of its own for every cause
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
    """A piece; a foreseen fault is no exception, which Ray would wrap in its own."""
    try:
        return work(piece), None
    except AdmtrtError as error:
        return piece, (isinstance(error, UserError), error.message, error.hint)


def _error(users: bool, message: str, hint: str) -> AdmtrtError:
    return (UserError if users else AdmtrtError)(message, hint=hint)


def _check_reachable(address: str) -> None:
    """Refuse an address where nothing listens, for which Ray itself takes minutes.

    Raises:
        EngineError: naming it.
    """
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address or not port.isdecimal():
        return  # a name that Ray knows
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
