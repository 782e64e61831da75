"""Write the inputs of each graph and PyTorch's outputs as files for Polygraphy."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from polygraphy.comparator import RunResults
from polygraphy.json import save_json

from admtrt.files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from admtrt.contract import GraphName
    from admtrt.runtime.slots import Images

_RUNNER = "pytorch"
"""Runner name under which Polygraphy shows the outputs."""


class Recorder:
    """Collects every case of the graphs' comparison.

    Args:
        folder: for the files; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cases: dict[GraphName, list[tuple[Mapping[str, Any], Mapping[str, Images]]]] = defaultdict(list)

    def add(self, graph: GraphName, feeds: Mapping[str, Any], expected: Mapping[str, Images]) -> None:
        """Add one batch: a graph's inputs, and PyTorch's outputs."""
        self._cases[graph].append((feeds, expected))

    def write(self) -> list[Path]:
        """``GRAPH.inputs.json`` and ``GRAPH.outputs.json`` of every graph; returns the files.

        Raises:
            OutputError: if the folder cannot be written.
        """
        written = []
        for graph, cases in self._cases.items():
            results = RunResults()
            results.add([dict(expected) for _, expected in cases], runner_name=_RUNNER)
            inputs = [dict(feeds) for feeds, _ in cases]
            for kind, content in (("inputs", inputs), ("outputs", results)):
                path = self._folder / f"{graph}.{kind}.json"
                with atomic_file(path) as temporary:
                    save_json(content, str(temporary))
                written.append(path)
        return written
