"""Open a bundle's graphs on the requested backend, or on the fastest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from admtrt.errors import BundleError
from admtrt.runtime.backends.auto import open_fastest
from admtrt.runtime.backends.choice import AUTO, BackendChoice
from admtrt.runtime.backends.registry import BACKENDS
from admtrt.schedule.guides import GUIDE_GRAPH

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from admtrt.bundle import Bundle
    from admtrt.contract import GraphName
    from admtrt.runtime.backends.auto import Fastest
    from admtrt.runtime.backends.graphs import GraphDenoiser

DEFAULT = BackendChoice()
"""ONNX Runtime in fp32 on every core."""


def open_denoiser(
    bundle: Bundle,
    choice: BackendChoice = DEFAULT,
    *,
    graphs: Collection[GraphName] | None = None,
    progress: Callable[[str | Fastest], None] = lambda _: None,
) -> GraphDenoiser:
    """A bundle's graphs on a backend.

    Args:
        bundle: a verified bundle.
        choice: the requested backend.
        graphs: names of the graphs to open; None for all that sampling runs.
        progress: called with what ``auto`` measures and finds.

    Raises:
        RequestError: if the backend cannot take the batch size.
        UserError: if the backend is not installed, finds no device or refuses a graph, or if the bundle's
            path is not valid UTF-8.
    """
    _check_path(bundle)
    if graphs is None:
        graphs = bundle.manifest.sampled_graphs
    if choice.name == AUTO:
        return open_fastest(bundle, choice, graphs=graphs, progress=progress)
    opened = BACKENDS[choice.name].open(bundle, choice, graphs=graphs)
    opened.check_batch(choice.batch_size)
    return opened


def _check_path(bundle: Bundle) -> None:
    """Refuse a path that is not valid UTF-8: the libraries take no others."""
    try:
        str(bundle.path.resolve()).encode()
    except UnicodeEncodeError:
        raise BundleError(
            f"the path {str(bundle.path)!r} is not in UTF-8, and no inference library opens such files",
            hint="Rename the folder.",
        ) from None


def graphs_with(bundle: Bundle, guides: Collection[str] | None) -> list[GraphName]:
    """The graphs that sampling may run with these guides; None means all guides."""
    return [
        name
        for name in bundle.manifest.sampled_graphs
        if guides is None or not name.startswith(GUIDE_GRAPH) or name.removeprefix(GUIDE_GRAPH) in guides
    ]
