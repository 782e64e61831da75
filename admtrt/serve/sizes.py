"""Choose the batch sizes to prepare for a model: by measurement, few, and within the memory."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from admtrt.contract import CLASSIFIER_GRADIENT, is_network
from admtrt.errors import RequestError
from admtrt.runtime.backends.graphs import GraphDenoiser
from admtrt.serve.costs import Costs, best_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from admtrt.bundle import Bundle
    from admtrt.contract import GraphName
    from admtrt.runtime.pipeline import Pipeline

_REPEATS, _LONG = 7, 0.5  # measured runs of a graph, and the seconds after which to stop


@dataclass(frozen=True)
class Sizes:
    """The batch sizes of one model: of its steps, and of the graphs that gain nothing from batches so large.

    Attributes:
        prepared: of a step, ascending, the cap last. Other batches are padded to the next size.
        any_size: whether all sizes cost the same, so that nothing is padded.
        of_graphs: the sizes of graphs with a smaller cap, which run larger batches in pieces.
    """

    prepared: tuple[int, ...]
    any_size: bool
    of_graphs: Mapping[GraphName, tuple[int, ...]] = field(default_factory=dict)

    @property
    def cap(self) -> int:
        """The most rows of a step."""
        return self.prepared[-1]

    def padded(self, count: int) -> int:
        """The batch size of a step of ``count`` rows."""
        return count if self.any_size else _next(self.prepared, count)

    def pieces(self, graph: GraphName, count: int) -> list[tuple[int, int]]:
        """The runs of a graph on ``count`` rows: the number of rows of each, and its batch size."""
        sizes = self.of_graphs.get(graph, self.prepared)
        rows = [min(sizes[-1], count - first) for first in range(0, count, sizes[-1])]
        return [(one, one if self.any_size else _next(sizes, one)) for one in rows]


def _next(sizes: Sequence[int], count: int) -> int:
    return min(size for size in sizes if size >= count)


def open_graphs(pipeline: Pipeline) -> list[GraphName]:
    """The graphs that a pipeline can run. Graphs of guides that are not served may be closed."""
    held, denoiser = pipeline.bundle.manifest.sampled_graphs, pipeline.denoiser
    known = denoiser.specs if isinstance(denoiser, GraphDenoiser) else held
    return [graph for graph in held if graph in known]


def weight_bytes(bundle: Bundle, graph: GraphName) -> int:
    """Bytes of a network's files: each compiled size holds at least as much. 0 for other graphs.

    A guide's graph holds another copy of the UNet's weights, even if it shares their file.
    """
    if not is_network(graph):
        return 0
    return sum(bundle.manifest.files[name].size for name in bundle.graph_files(bundle.graph_entry(graph)))


def prepare(
    pipeline: Pipeline,
    costs: Costs,
    *,
    max_rows: int,
    memory: int,
    sizes: Sequence[int] = (),
    note: Callable[[str], None] = lambda _: None,
) -> Sizes:
    """Measure every graph, choose the caps, and let the backend compile the sizes.

    The cap of a step is that of the UNet and the classifier together. Every network also has a cap of its
    own, at most the step's.

    Args:
        pipeline: the bundle's pipeline.
        costs: receives the measurements.
        max_rows: the largest batch that is tried.
        memory: bytes that the copies of the weights may take.
        sizes: batch sizes to prepare, the same for all graphs; by default powers of two up to the caps and
            the sizes half-way between them, or as many of these as fit.
        note: called with progress messages.

    Raises:
        RequestError: if the weights do not fit.
        EngineError: if the library fails.
    """
    denoiser, bundle = pipeline.denoiser, pipeline.bundle
    own = denoiser if isinstance(denoiser, GraphDenoiser) else None
    any_size = own is None or own.any_size
    graphs = open_graphs(pipeline)
    weights = {graph: weight_bytes(bundle, graph) for graph in graphs}
    copied = own is not None and own.copies_weights

    def held(by_graph: Mapping[GraphName, Sequence[int]]) -> int:
        return sum(weights[graph] * (len(by_graph[graph]) if copied else 1) for graph in graphs)

    if sizes:
        wanted = [dict.fromkeys(graphs, tuple(sorted(set(sizes))))]
    else:
        caps = _measured_caps(pipeline, costs, max_rows)
        many_to_few = (_halves, _powers, _ends, _one)
        wanted = [{graph: choose(cap) for graph, cap in caps.items()} for choose in many_to_few]
    fitting = [by_graph for by_graph in wanted if held(by_graph) <= memory]
    if not fitting:
        raise RequestError(
            f"{bundle.path}: the weights take {_gib(held(wanted[-1]))}, more than {_gib(memory)}",
            hint="Give --memory more, --sizes or --guides fewer, or use the backend onnxruntime, which has "
            "one copy.",
        )
    chosen = fitting[0]
    prepared = max(chosen.values(), key=max)
    if own is not None:
        own.prepare(chosen)
    for graph, batches in chosen.items():
        for size in batches:
            _measure(pipeline, costs, graph, size)
    smaller = {graph: batches for graph, batches in chosen.items() if batches[-1] < prepared[-1]}
    note(
        f"{bundle.path}: at most {prepared[-1]} rows a step"
        + "".join(f", {batches[-1]} of {graph}" for graph, batches in smaller.items())
        + ("" if any_size else f", batches of {', '.join(map(str, prepared))}")
        + f", {_gib(held(chosen))} of weights"
    )
    return Sizes(prepared, any_size, smaller)


def _halves(cap: int) -> tuple[int, ...]:
    """Powers of two, and the sizes half-way between them: at most a quarter of the rows are padding."""
    between = {size * 3 // 2 for size in _powers(cap)[1:]}
    return tuple(sorted({*_powers(cap), *(size for size in between if size < cap)}))


def _powers(cap: int) -> tuple[int, ...]:
    """Powers of two below the cap, and the cap."""
    return (*(1 << bit for bit in range(cap.bit_length()) if 1 << bit < cap), cap)


def _ends(cap: int) -> tuple[int, ...]:
    return tuple(sorted({1, cap}))


def _one(_: int) -> tuple[int, ...]:
    return (1,)


def _measured_caps(pipeline: Pipeline, costs: Costs, max_rows: int) -> dict[GraphName, int]:
    """Measure each network at powers of two as long as its cost per row falls.

    Graphs that are no networks cost little, and run whole steps.
    """
    graphs = open_graphs(pipeline)
    own = {graph: _measured_cap(pipeline, costs, graph, max_rows) for graph in graphs if is_network(graph)}
    usual = [graph for graph in own if graph in ("unet", CLASSIFIER_GRADIENT)]
    step = best_size({size: sum(costs.seconds(graph, size) for graph in usual) for size in _powers(max_rows)})
    return {graph: min(own.get(graph, step), step) for graph in graphs}


def _measured_cap(pipeline: Pipeline, costs: Costs, graph: GraphName, max_rows: int) -> int:
    seconds: dict[int, float] = {}
    for size in _powers(max_rows):
        _measure(pipeline, costs, graph, size)
        seconds[size] = costs.seconds(graph, size)
        if best_size(seconds) * 4 <= size:
            break
    return best_size(seconds)


def _measure(pipeline: Pipeline, costs: Costs, graph: GraphName, size: int) -> None:
    """Time a graph at a batch size, after a first run that may compile.

    The shortest of several runs counts, because other load only makes runs longer.
    """
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
