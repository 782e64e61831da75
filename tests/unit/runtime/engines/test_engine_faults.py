"""A node's place in its PyTorch model, read from the graph without the onnx package."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import pytest
from bundles import exported_bundle
from onnx_graphs import parse

from admtrt.errors import BundleError
from admtrt.onnx_wire import node_metadata
from admtrt.runtime.engines.faults import modules_of

if TYPE_CHECKING:
    from pathlib import Path

SCOPES = "pkg.torch.onnx.name_scopes"


@pytest.mark.parametrize("graph", ["unet", "classifier_gradient", "update"])
def test_the_metadata_is_what_onnx_reads(graph: str) -> None:
    path = exported_bundle("guided") / f"{graph}.onnx"
    nodes = onnx.load(path).graph.node
    expected = {
        node.name: entry.value
        for node in nodes
        if node.name
        for entry in node.metadata_props
        if entry.key == SCOPES
    }
    assert node_metadata(path, SCOPES) == expected


@pytest.mark.parametrize(
    ("scopes", "module"),
    [("['', 'middle_block.1', 'conv2d']", "middle_block.1"), ("['op']", None), ("[", None), ("7", None)],
)
def test_a_module_is_read_where_the_graph_remembers_it(
    scopes: str, module: str | None, tmp_path: Path
) -> None:
    model = parse("g (float[N,3] x) => (float[N,3] y) { h = Neg(x)\n y = Neg(h) }")
    for node, name in zip(model.graph.node, ("first", "second"), strict=True):
        node.name = name
    entries = [model.graph.node[1].metadata_props.add() for _ in range(2)]
    entries[0].key, entries[0].value = "namespace", "something else"
    entries[1].key, entries[1].value = SCOPES, scopes
    onnx.save(model, tmp_path / "g.onnx")
    assert modules_of(tmp_path / "g.onnx") == ({} if module is None else {"second": module})


def test_what_is_no_graph_is_refused_and_names_no_module(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"junkjunk")
    with pytest.raises(BundleError, match="is not an ONNX graph"):
        node_metadata(tmp_path / "g.onnx", SCOPES)
    assert modules_of(tmp_path / "g.onnx") == {}
