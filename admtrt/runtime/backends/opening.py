"""Opening a bundle's graphs: on the backend that is asked for, or on the fastest."""

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
        choice: of the backend.
        graphs: those that are needed; None for all that sampling runs.
        progress: told what ``auto`` measures, and what it has found.

    Raises:
        RequestError: for a batch that the backend cannot take.
        UserError: if the backend is not installed, finds no device or refuses a graph, or no library
            takes the path of the bundle.
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
    """Refuse a place that the libraries, which take paths in UTF-8 alone, cannot be told."""
    try:
        str(bundle.path.resolve()).encode()
    except UnicodeEncodeError:
        raise BundleError(
            f"the path {str(bundle.path)!r} is not in UTF-8, and no inference library opens such files",
            hint="Rename the folder.",
        ) from None


def graphs_with(bundle: Bundle, guides: Collection[str] | None) -> list[GraphName]:
    """The graphs that sampling may run, but those of other guides; None for all guides."""
    return [
        name
        for name in bundle.manifest.sampled_graphs
        if guides is None or not name.startswith(GUIDE_GRAPH) or name.removeprefix(GUIDE_GRAPH) in guides
    ]
