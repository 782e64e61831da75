"""Costs of a step: seconds of every graph by batch size, measured at start and while serving."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from admtrt.contract import GraphName
    from admtrt.runtime.sampler import Denoiser
    from admtrt.runtime.slots import Array
    from admtrt.serve.sizes import Sizes

_KEPT = 15  # measurements per graph and size: few, so that the median follows changes
_NEAR_BEST = 1.05


class Costs:
    """Running medians of seconds, by graph and batch size."""

    def __init__(self) -> None:
        self._measured: dict[tuple[GraphName, int], deque[float]] = {}
        self._seconds: dict[GraphName, dict[int, float]] = {}

    def record(self, graph: GraphName, size: int, seconds: float) -> None:
        """Add a measurement."""
        kept = self._measured.setdefault((graph, size), deque(maxlen=_KEPT))
        kept.append(seconds)
        # Replace the tuple: other threads read it, and a deque cannot be read while it changes.
        self._seconds[graph] = {**self._seconds.get(graph, {}), size: sorted(kept)[len(kept) // 2]}

    def seconds(self, graph: GraphName, size: int) -> float:
        """Seconds of one run, interpolated linearly between measured sizes and extrapolated in proportion."""
        known = self._seconds.get(graph, {})
        if not known or size < 1:
            return 0.0
        sizes = sorted(known)
        place = bisect_left(sizes, size)
        if place == len(sizes):
            return known[sizes[-1]] * size / sizes[-1]
        if sizes[place] == size or place == 0:
            return known[sizes[place]]
        low, high = sizes[place - 1], sizes[place]
        return known[low] + (known[high] - known[low]) * (size - low) / (high - low)

    def of(self, runs: Mapping[GraphName, int], size: int) -> float:
        """Seconds of the given numbers of runs of each graph, at one batch size."""
        return sum(count * self.seconds(graph, size) for graph, count in runs.items())


def best_size(seconds: Mapping[int, float]) -> int:
    """The smallest size with a throughput within 5% of the best: larger ones only add latency.

    Args:
        seconds: seconds of a step at each size.
    """
    best = min(each / size for size, each in seconds.items())
    return min(size for size, each in seconds.items() if each / size <= best * _NEAR_BEST)


class MeasuredDenoiser:
    """A denoiser that measures every run, and runs batches above a graph's own cap in pieces.

    Args:
        denoiser: runs the graphs.
        costs: receives the measurements.
        sizes: the batch sizes of each graph.

    Attributes:
        busy: seconds in graphs so far.
    """

    def __init__(self, denoiser: Denoiser, costs: Costs, sizes: Sizes) -> None:
        self._denoiser = denoiser
        self._costs = costs
        self._sizes = sizes
        self.busy = 0.0

    def run(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        batch = len(next(iter(feeds.values())))
        pieces = self._sizes.pieces(graph, batch)
        if pieces == [(batch, batch)]:
            return self._timed(graph, feeds)
        parts: list[dict[str, Array]] = []
        first = 0
        for rows, size in pieces:
            taken = np.minimum(np.arange(first, first + size), first + rows - 1)
            outputs = self._timed(graph, {name: values[taken] for name, values in feeds.items()})
            parts.append({name: values[:rows] for name, values in outputs.items()})
            first += rows
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _timed(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        began = time.perf_counter()
        outputs = self._denoiser.run(graph, feeds)
        seconds = time.perf_counter() - began
        self.busy += seconds
        self._costs.record(graph, len(next(iter(feeds.values()))), seconds)
        return outputs
