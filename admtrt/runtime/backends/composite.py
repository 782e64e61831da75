"""Two backends side by side: one runs the UNet, the other the classifier's gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from admtrt.contract import CLASSIFIER_GRADIENT
from admtrt.runtime.backends.graphs import GraphDenoiser

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from admtrt.contract import GraphName
    from admtrt.runtime.slots import Array


class Composite(GraphDenoiser):
    """A denoiser made of two.

    Attributes:
        generator: runs the UNet and the update.
        guide: runs the gradient.
    """

    def __init__(self, generator: GraphDenoiser, guide: GraphDenoiser) -> None:
        self.generator = generator
        self.guide = guide
        self.specs = {**generator.specs, **guide.specs}
        self.any_size = generator.any_size and guide.any_size
        self.copies_weights = generator.copies_weights or guide.copies_weights

    def _run(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return (self.guide if graph == CLASSIFIER_GRADIENT else self.generator).run(graph, feeds)

    def open(self, graphs: Collection[GraphName]) -> None:
        """See :meth:`GraphDenoiser.open`."""
        self.generator.open([graph for graph in graphs if graph != CLASSIFIER_GRADIENT])
        self.guide.open([graph for graph in graphs if graph == CLASSIFIER_GRADIENT])

    def prepare(self, sizes: Mapping[GraphName, Sequence[int]]) -> None:
        """See :meth:`GraphDenoiser.prepare`."""
        self.generator.prepare(
            {graph: batches for graph, batches in sizes.items() if graph != CLASSIFIER_GRADIENT}
        )
        self.guide.prepare(
            {graph: batches for graph, batches in sizes.items() if graph == CLASSIFIER_GRADIENT}
        )

    def close(self) -> None:
        """See :meth:`GraphDenoiser.close`."""
        self.generator.close()
        self.guide.close()
