"""Opening a bundle's graphs: on the backend that is asked for, or on the fastest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from admtrt.contract import precision_named
from admtrt.errors import BundleError, RequestError
from admtrt.runtime.backends.auto import open_fastest
from admtrt.runtime.backends.registry import BACKENDS, PLANS_ONLY
from admtrt.runtime.request import whole_number
from admtrt.schedule.guides import GUIDE_GRAPH

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from admtrt.bundle import Bundle
    from admtrt.contract import GraphName, Precision
    from admtrt.runtime.backends.auto import Choice
    from admtrt.runtime.backends.graphs import GraphDenoiser

AUTO = "auto"
_MAX_THREADS = 1024


def open_denoiser(
    bundle: Bundle,
    backend: str = "onnxruntime",
    precision: Precision = "fp32",
    *,
    threads: int | None = None,
    plans: str | Path | None = None,
    batch_size: int = 1,
    graphs: Collection[GraphName] | None = None,
    note: Callable[[str], None] = lambda _: None,
    chosen: Callable[[Choice], None] = lambda _: None,
) -> GraphDenoiser:
    """A bundle's graphs on a backend.

    Args:
        bundle: a verified bundle.
        backend: one of :data:`BACKENDS`, or ``auto`` for the fastest here.
        precision: what the networks compute in.
        threads: of a CPU backend; None takes every core.
        plans: folder of the plans of ``tensorrt``; None for the bundle's own.
        batch_size: the largest that will come; ``auto`` chooses for it.
        graphs: those that are needed; None for all.
        note: told what ``auto`` measures.
        chosen: told what ``auto`` chooses.

    Raises:
        RequestError: for an unknown name, a precision that the backend has not, threads out of range,
            plans for a backend that runs none, or a batch that it cannot take.
        UserError: if the backend is not installed, finds no device or refuses a graph, or no library
            takes the path of the bundle.
    """
    check_request(backend, precision, threads, plans)
    threads = None if threads is None else whole_number(threads, "threads")
    plans = None if plans is None else Path(plans)
    batch_size = whole_number(batch_size, "batch_size")
    if batch_size < 1:
        raise RequestError(f"batch_size is {batch_size}; expected at least 1")
    _check_path(bundle)
    if backend == AUTO:
        return open_fastest(
            bundle,
            precision,
            threads=threads,
            plans=plans,
            batch_size=batch_size,
            graphs=graphs,
            note=note,
            chosen=chosen,
        )
    opened = BACKENDS[backend].open(bundle, precision, threads=threads, plans=plans, graphs=graphs)
    opened.check_batch(batch_size)
    return opened


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that no machine has.

    Raises:
        RequestError: if it is no whole number from 1 to 1024.
    """
    if threads is not None and not 1 <= whole_number(threads, "threads") <= _MAX_THREADS:
        raise RequestError(f"threads is {threads}; expected 1 to {_MAX_THREADS}")


def check_request(backend: str, precision: str, threads: int | None, plans: str | Path | None = None) -> None:
    """Refuse what no machine could open.

    Raises:
        RequestError: see :func:`open_denoiser`.
    """
    known = ", ".join([*BACKENDS, AUTO])
    if backend != AUTO and backend not in BACKENDS:
        raise RequestError(f"backend {backend!r} is unknown; expected one of {known}")
    precision_named(precision, "precision")
    check_threads(threads)
    if backend == AUTO:
        if plans is not None and precision == "fp32":
            raise RequestError(
                f"backend {AUTO!r} runs no plans in fp32, where TensorRT may round products to TF32, "
                f"but {plans} was given as their folder",
                hint=f"Leave it out, or use the backend {PLANS_ONLY}.",
            )
        return
    chosen = BACKENDS[backend]
    if precision not in chosen.precisions:
        others = [other.name for other in BACKENDS.values() if precision in other.precisions]
        raise RequestError(
            f"backend {backend!r} computes in {' or '.join(chosen.precisions)}, not in {precision}",
            hint=f"Backends with {precision}: {', '.join(others)}.",
        )
    if threads is not None and chosen.device != "cpu":
        raise RequestError(
            f"threads is {threads}, but backend {backend!r} does not run on the CPU",
            hint="Leave the threads out.",
        )
    if plans is not None and backend != PLANS_ONLY:
        raise RequestError(
            f"backend {backend!r} runs no plans, but {plans} was given as their folder",
            hint=f"Leave it out, or use the backend {PLANS_ONLY}.",
        )


def _check_path(bundle: Bundle) -> None:
    """Refuse a place that the libraries, which take paths in UTF-8 alone, cannot be told."""
    try:
        str(bundle.path.resolve()).encode()
    except UnicodeEncodeError:
        raise BundleError(
            f"the path {str(bundle.path)!r} is not in UTF-8, and no inference library opens such files",
            hint="Rename the folder.",
        ) from None


def graphs_with(bundle: Bundle, guides: Collection[str] | None) -> list[GraphName] | None:
    """The graphs of a bundle but those of other guides; None for all of them."""
    names = list(bundle.manifest.graphs)
    kept = [
        name
        for name in names
        if guides is None or not name.startswith(GUIDE_GRAPH) or name.removeprefix(GUIDE_GRAPH) in guides
    ]
    return None if kept == names else kept
