"""The graph that a plan is built from, and the hash of its content."""

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
        graph: its name.
        precision: what it computes in.
        path: the ONNX file; external weights lie beside it.
        spec: inputs and outputs.
        digest: SHA-256 (hexadecimal) over the file and its external weights.
        engine_form: False where the bundle has no fp32 engine form, and the form for CPUs is taken.
        reading: held by whoever reads the files, see :meth:`admtrt.bundle.Bundle.reading`.
    """

    graph: GraphName
    precision: Precision
    path: Path
    spec: GraphSpec
    digest: str
    engine_form: bool
    reading: Callable[[], AbstractContextManager[object]] = nullcontext


def graph_source(bundle: Bundle, graph: GraphName, precision: Precision) -> GraphSource:
    """The engine form of a graph; in fp32 the form for CPUs where there is no other.

    Raises:
        BundleError: if the bundle has no such graph, or not in that precision.
    """
    engine_form = precision != "fp32" or precision in bundle.manifest.engine_graphs
    engine = precision if engine_form else None
    entry, path = bundle.graph_entry(graph, engine), bundle.graph_path(graph, engine)
    files = bundle.manifest.files  # a bundle's files are verified against these hashes when it is opened
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
