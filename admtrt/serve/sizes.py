"""Choose the batch sizes to prepare for a model: by measurement, few, and within the memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from admtrt.contract import is_network
from admtrt.errors import RequestError
from admtrt.runtime.backends.graphs import GraphDenoiser
from admtrt.serve.costs import Costs, best_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from admtrt.bundle import Bundle
    from admtrt.contract import GraphName
    from admtrt.runtime.pipeline import Pipeline

_REPEATS, _LONG = 7, 0.5  # measured runs of a graph, and the seconds after which to stop


@dataclass(frozen=True)
class Sizes:
    """The batch sizes of one network.

    Attributes:
        prepared: ascending, the cap last. Other batches are padded to the next size.
        any_size: whether all sizes cost the same, so that nothing is padded.
    """

    prepared: tuple[int, ...]
    any_size: bool

    @property
    def cap(self) -> int:
        """The most rows of a step."""
        return self.prepared[-1]

    def padded(self, count: int) -> int:
        """The batch size in which ``rows`` rows run."""
        return count if self.any_size else min(size for size in self.prepared if size >= count)


def open_graphs(pipeline: Pipeline) -> list[GraphName]:
    """The graphs that a pipeline can run. Graphs of guides that are not served may be closed."""
    held, denoiser = pipeline.bundle.manifest.sampled_graphs, pipeline.denoiser
    known = denoiser.specs if isinstance(denoiser, GraphDenoiser) else held
    return [graph for graph in held if graph in known]


def weight_bytes(bundle: Bundle, graphs: Sequence[GraphName]) -> int:
    """Bytes of the networks' files. Each compiled graph holds at least its own copy.

    A guide's graph holds another copy of the UNet's weights, even if it shares their file.
    """
    networks = [bundle.graph_entry(graph) for graph in graphs if is_network(graph)]
    return sum(bundle.manifest.files[name].size for entry in networks for name in bundle.graph_files(entry))


def prepare(
    pipeline: Pipeline,
    costs: Costs,
    *,
    max_rows: int,
    memory: int,
    sizes: Sequence[int] = (),
    note: Callable[[str], None] = lambda _: None,
) -> Sizes:
    """Measure every graph, choose the cap, and let the backend compile the sizes.

    Args:
        pipeline: the bundle's pipeline.
        costs: receives the measurements.
        max_rows: the largest batch that is tried.
        memory: bytes that the copies of the weights may take.
        sizes: batch sizes to prepare; by default powers of two up to the cap, or 1 and the cap if more do not
            fit.
        note: called with progress messages.

    Raises:
        RequestError: if the weights do not fit.
        EngineError: if the library fails.
    """
    denoiser, bundle = pipeline.denoiser, pipeline.bundle
    own = denoiser if isinstance(denoiser, GraphDenoiser) else None
    any_size = own is None or own.any_size
    graphs = open_graphs(pipeline)
    weights = weight_bytes(bundle, graphs)
    each = weights if own is not None and own.copies_weights else 0
    once = weights - each
    fitting = max_rows if not each else memory // each
    if once + each > memory or (sizes and len(set(sizes)) > fitting):
        wanted = max(once, each * max(1, len(set(sizes))))
        raise RequestError(
            f"{bundle.path}: the weights take {_gib(wanted)}, more than {_gib(memory)}",
            hint="Give --memory more, --sizes or --guides fewer, or use the backend onnxruntime, which has "
            "one copy.",
        )
    if sizes:
        chosen = tuple(sorted(set(sizes)))
        for size in chosen:
            _measure(pipeline, costs, size)
    else:
        chosen = _powers(_measured_cap(pipeline, costs, max_rows), fitting)
    if own is not None:
        own.prepare(dict.fromkeys(graphs, chosen))
    for size in chosen:
        _measure(pipeline, costs, size)
    copies = len(chosen) if each else 1
    note(
        f"{bundle.path}: at most {chosen[-1]} rows a step"
        + ("" if any_size else f", batches of {', '.join(map(str, chosen))}")
        + f", {_gib(max(each, once) * copies)} of weights"
    )
    return Sizes(chosen, any_size)


def _powers(cap: int, fitting: int) -> tuple[int, ...]:
    """Powers of two below the cap, and the cap; if they do not fit, 1 and the cap, or only 1."""
    powers = (*(1 << bit for bit in range(cap.bit_length()) if 1 << bit < cap), cap)
    return powers if len(powers) <= fitting else tuple(sorted({1, cap if fitting > 1 else 1}))


def _measured_cap(pipeline: Pipeline, costs: Costs, max_rows: int) -> int:
    """Measure powers of two as long as the cost per row falls."""
    graphs = [graph for graph in open_graphs(pipeline) if is_network(graph)]
    seconds: dict[int, float] = {}
    for size in (*(1 << bit for bit in range(max_rows.bit_length()) if 1 << bit < max_rows), max_rows):
        _measure(pipeline, costs, size)
        seconds[size] = sum(costs.seconds(graph, size) for graph in graphs)
        if best_size(seconds) * 4 <= size:
            break
    return best_size(seconds)


def _measure(pipeline: Pipeline, costs: Costs, size: int) -> None:
    """Time every graph at a batch size, after a first run that may compile.

    The shortest of several runs counts, because other load only makes runs longer.
    """
    for graph in open_graphs(pipeline):
        _run(pipeline, graph, size)
        runs: list[float] = []
        while len(runs) < _REPEATS and sum(runs) < _LONG:
            runs.append(_run(pipeline, graph, size))
        costs.record(graph, size, min(runs))


def _run(pipeline: Pipeline, graph: GraphName, size: int) -> float:
    spec = pipeline.bundle.graph_entry(graph).spec
    feeds = {tensor.name: np.zeros(tensor.sized(size), tensor.dtype) for tensor in spec.inputs}
    began = time.perf_counter()
    pipeline.denoiser.run(graph, feeds)
    return time.perf_counter() - began


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
