"""Base of all backends: a denoiser from graphs that run by name, and the check of a graph's contract."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from admtrt.errors import AdmtrtError, BundleError, EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from admtrt.contract import GraphName, GraphSpec
    from admtrt.runtime.slots import Array

_SHARED = 2
Made = TypeVar("Made")


class GraphDenoiser(ABC):
    """A :class:`~admtrt.runtime.sampler.Denoiser` over arrays in host memory.

    Attributes:
        specs: inputs and outputs of the graphs that can be run.
        any_size: whether unprepared batch sizes cost no more than prepared ones.
        copies_weights: whether each prepared size holds its own copy of the weights in host memory.
    """

    specs: Mapping[GraphName, GraphSpec]
    any_size: bool = True
    copies_weights: bool = False

    def run(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run one graph on arrays by name; every output by name, owned by the caller.

        Raises:
            KeyError: if the backend was not made for the graph.
            BundleError: as :meth:`open`.
            ValueError: if the inputs break the graph's contract, or differ in batch size.
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
        """The last accepted input specs of each graph, to skip the check: most steps repeat them."""
        return {}

    @abstractmethod
    def _run(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """:meth:`run` on inputs that have been checked."""

    def open(self, graphs: Collection[GraphName]) -> None:  # noqa: B027 - most open all when they are made
        """Open these graphs, so that their faults show before long work.

        A backend may open a graph only now, or when it first runs: each holds its own copy of the weights.

        Raises:
            KeyError: if a graph is not among those that the backend was made for.
            BundleError: if a graph cannot be used.
        """

    def prepare(self, sizes: Mapping[GraphName, Sequence[int]]) -> None:  # noqa: B027 - most take any size
        """Compile these batch sizes of these graphs, and keep exactly them until the next call.

        Each graph keeps two more sizes, the last used ones. Backends for which all sizes cost the same do
        nothing.

        Raises:
            RequestError: if a size is larger than the backend takes.
            EngineError: if the library fails.
        """

    def check_batch(self, batch: int) -> None:  # noqa: B027 - most have nothing to check
        """Refuse a batch that cannot be run; most backends take any.

        Raises:
            RequestError: naming the largest.
        """

    def close(self) -> None:  # noqa: B027 - most hold only host memory
        """Release everything but host memory. The graphs cannot be run afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PerBatch(Generic[Made]):
    """Cache by graph and batch size: the prepared sizes of each graph and the last two others.

    Two, because a run has full batches and a remainder. Not more, because every size holds memory of its own.

    Attributes:
        made: the cached values, the most recently used last.
    """

    def __init__(self) -> None:
        self.made: dict[tuple[GraphName, int], Made] = {}
        self._prepared: set[tuple[GraphName, int]] = set()

    def get(self, graph: GraphName, batch: int, make: Callable[[GraphName, int], Made]) -> Made:
        """The cached value, or the result of ``make``. The least recently used size is evicted."""
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
        """Drop all other sizes, make the missing ones, and keep these from now on."""
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
    """Turn whatever a library raises while it does ``what`` into an error that names graph and batch.

    Raises:
        EngineError: in place of the library's exception.
    """
    try:
        yield
    except AdmtrtError:
        raise
    except Exception as error:  # each library raises its own types
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
