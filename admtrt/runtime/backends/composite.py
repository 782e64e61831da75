"""Two backends side by side: the UNet on the one, the classifier's gradient on the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from admtrt.runtime.backends.graphs import GraphDenoiser

if TYPE_CHECKING:
    from admtrt.contract import GraphName
    from admtrt.runtime.sampler import Images


class Composite(GraphDenoiser):
    """A denoiser made of two.

    Args:
        generator: runs the UNet and the update.
        guide: runs the gradient.
    """

    def __init__(self, generator: GraphDenoiser, guide: GraphDenoiser) -> None:
        self._generator = generator
        self._guide = guide

    def run(self, name: GraphName, feeds: dict[str, Any]) -> dict[str, Images]:
        """Run one graph on arrays by name; every output by name."""
        return (self._guide if name == "classifier_gradient" else self._generator).run(name, feeds)
