"""Base of all backends: a denoiser from graphs that run by name, and the check of a graph's contract."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from admtrt.errors import AdmtrtError, BundleError, EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from admtrt.contract import GraphName, GraphSpec
    from admtrt.runtime.slots import Array

_SHARED = 2
Made = TypeVar("Made")


class GraphDenoiser(ABC):
    """A :class:`~admtrt.runtime.sampler.Denoiser` over arrays in host memory.

    Attributes:
        specs: of the graphs that are open.
        any_size: whether a batch of a size that nobody prepared costs no more than others.
        copies_weights: whether each prepared size has the weights in the host's memory once more.
    """

    specs: Mapping[GraphName, GraphSpec]
    any_size: bool = True
    copies_weights: bool = False

    def run(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run one graph on arrays by name; every output by name, owned by the caller.

        Raises:
            KeyError: if the graph is not open.
            ValueError: if the inputs are not those of the graph's contract, or of different batch sizes.
            RequestError: if the batch is larger than the backend takes.
            EngineError: if the library fails, most often for want of memory.
        """
        given = {name: (array.dtype, array.shape) for name, array in feeds.items()}
        if given != self._accepted.get(graph):
            _check_feeds(graph, self.specs[graph], feeds)
            self._accepted[graph] = given
        return self._run(graph, feeds)

    @functools.cached_property
    def _accepted(self) -> dict[GraphName, dict[str, tuple[np.dtype[Any], tuple[int, ...]]]]:
        """Inputs that each graph took last, which fit: most steps of a sampler repeat them."""
        return {}

    @abstractmethod
    def _run(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """:meth:`run`, with inputs that fit."""

    def prepare(self, sizes: Mapping[GraphName, Sequence[int]]) -> None:  # noqa: B027 - most take any
        """Compile these batch sizes of these graphs, and keep exactly these until the next call.

        Other sizes that come share two places of each graph. Backends that take any size alike do nothing.

        Raises:
            RequestError: if a size is larger than the backend takes.
            EngineError: if the library fails.
        """

    def check_batch(self, batch: int) -> None:  # noqa: B027 - most have nothing to check
        """Refuse a batch that cannot be run; most backends take any.

        Raises:
            RequestError: naming the largest.
        """

    def close(self) -> None:  # noqa: B027 - most hold nothing but memory of the host
        """Give back what is held beside the host's memory; the graphs cannot be run afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PerBatch(Generic[Made]):
    """Cache by graph and batch size: of each graph, the prepared sizes and the last two others.

    A run has full batches and a rest; every size holds memory of its own.

    Attributes:
        made: what is kept, the last used last.
    """

    def __init__(self) -> None:
        self.made: dict[tuple[GraphName, int], Made] = {}
        self._prepared: set[tuple[GraphName, int]] = set()

    def get(self, graph: GraphName, batch: int, make: Callable[[GraphName, int], Made]) -> Made:
        """Cached value, or the result of ``make``; the least recently used size makes room."""
        made = self.made.pop((graph, batch), None)
        if made is None:
            sharing = [key for key in self.made if key[0] == graph and key not in self._prepared]
            if len(sharing) >= _SHARED and (graph, batch) not in self._prepared:
                del self.made[sharing[0]]
            made = make(graph, batch)
        self.made[graph, batch] = made
        return made

    def prepare(
        self, sizes: Mapping[GraphName, Sequence[int]], make: Callable[[GraphName, int], Made]
    ) -> None:
        """Drop all but these sizes, make those that are missing, and keep them from now on."""
        self._prepared = {(graph, batch) for graph, batches in sizes.items() for batch in batches}
        for key in self.made.keys() - self._prepared:
            del self.made[key]
        for graph, batch in sorted(self._prepared):
            self.get(graph, batch, make)


def batch_of(feeds: Mapping[str, Array]) -> int:
    """The batch size of a graph's inputs."""
    return len(next(iter(feeds.values())))


def _check_feeds(graph: GraphName, spec: GraphSpec, feeds: Mapping[str, Array]) -> None:
    names = [tensor.name for tensor in spec.inputs]
    if feeds.keys() != set(names):
        raise ValueError(f"graph '{graph}' takes {', '.join(names)}; it was given {', '.join(feeds)}")
    batch = len(feeds[names[0]])
    for tensor in spec.inputs:
        given = feeds[tensor.name]
        if given.dtype != tensor.dtype or given.shape != tensor.sized(batch):
            raise ValueError(
                f"graph '{graph}' takes {tensor}; in a batch of {batch} it was given "
                f"{given.dtype}{list(given.shape)}"
            )


@contextlib.contextmanager
def working(library: str, graph: GraphName, batch: int, *, what: str = "run") -> Iterator[None]:
    """Name the graph and the batch in whatever a library raises while it does ``what``.

    Raises:
        EngineError: in place of it.
    """
    try:
        yield
    except AdmtrtError:
        raise
    except Exception as error:  # every library has types of its own for every cause
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EngineError(
            f"{library} cannot {what} graph '{graph}' for a batch of {batch}: {reason}",
            hint="Where memory ran out, use a smaller batch.",
        ) from error


def check_contract(path: Path, inputs: Sequence[str], outputs: Sequence[str], spec: GraphSpec) -> None:
    """A graph's own inputs and outputs, each as ``name dtype[sizes]``, must be those of the manifest.

    Raises:
        BundleError: if they differ.
    """
    for found, tensors in ((inputs, spec.inputs), (outputs, spec.outputs)):
        declared = [str(tensor) for tensor in tensors]
        if list(found) != declared:
            raise BundleError(
                f"{path} has {', '.join(found)}; the manifest declares {', '.join(declared)}",
                hint="Export the checkpoint again.",
            )
