"""The graph that a plan is built from, and its hash."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from admtrt.bundle import Bundle
    from admtrt.contract import GraphName, GraphSpec, Precision


@dataclass(frozen=True)
class GraphSource:
    """One graph of a bundle in one precision.

    Attributes:
        graph: name of the graph.
        precision: in which it computes.
        path: the ONNX file, with its external weights beside it.
        spec: inputs and outputs.
        digest: SHA-256 (hexadecimal) over the file and its external weights.
        engine_form: False if the bundle has no fp32 engine form and this is the CPU form.
        reading: context manager to hold while reading the files, see :meth:`admtrt.bundle.Bundle.reading`.
    """

    graph: GraphName
    precision: Precision
    path: Path
    spec: GraphSpec
    digest: str
    engine_form: bool
    reading: Callable[[], AbstractContextManager[object]] = nullcontext


def graph_source(bundle: Bundle, graph: GraphName, precision: Precision) -> GraphSource:
    """The engine form of a graph; for fp32, the CPU form if there is no engine form.

    Raises:
        BundleError: if the bundle does not have the graph in that precision.
    """
    engine_form = precision != "fp32" or precision in bundle.manifest.engine_graphs
    engine = precision if engine_form else None
    entry, path = bundle.graph_entry(graph, engine), bundle.graph_path(graph, engine)
    files = bundle.manifest.files  # Bundle.open has verified these hashes
    digest = hashlib.sha256(" ".join(files[name].sha256 for name in bundle.graph_files(entry)).encode())
    return GraphSource(
        graph=graph,
        precision=precision,
        path=path,
        spec=entry.spec,
        digest=digest.hexdigest(),
        engine_form=engine_form,
        reading=partial(bundle.reading, graph, engine),
    )
