"""Graphs with external weights: after any interruption of the writing, a graph has its own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from folders import names

from admtrt.errors import OutputError
from admtrt.export import write
from admtrt.export.write import write_graph

SIZE = 512  # values, above the size from which they go to another file


def graph(value: float) -> ir.Model:
    """Adds a constant vector to x."""
    weights = onnx.numpy_helper.from_array(np.full(SIZE, value, np.float32), "w")
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> '
        f"g (float[{SIZE}] x) => (float[{SIZE}] y) {{ y = Add (x, w) }}"
    )
    model.graph.initializer.append(weights)
    return ir.from_proto(model)


def result(path: Path) -> float:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.zeros(SIZE, np.float32)})
    assert len(np.unique(y)) == 1
    return float(y[0])


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "EXTERNAL_THRESHOLD", 0)


def test_a_graph_replaces_another_together_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "g.onnx.data").write_text("of somebody else")
    for value, data in ((1.0, "g.onnx.data"), (2.0, "g.onnx.other.data"), (3.0, "g.onnx.data")):
        write_graph(graph(value), tmp_path / "g.onnx")
        assert result(tmp_path / "g.onnx") == value
        assert names(tmp_path) == ["g.onnx", data]
    monkeypatch.setattr(write, "EXTERNAL_THRESHOLD", 2**20)
    write_graph(graph(4.0), tmp_path / "g.onnx")
    assert result(tmp_path / "g.onnx") == 4.0
    assert names(tmp_path) == ["g.onnx"]


def test_an_interruption_between_weights_and_graph_leaves_the_old_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_graph(graph(1.0), tmp_path / "g.onnx")
    replace = Path.replace

    def failing(self: Path, target: Any) -> Path:
        if self.name == "g.onnx":
            raise OSError(5, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OutputError, match=r"cannot write .*g\.onnx: Input/output error"):
        write_graph(graph(2.0), tmp_path / "g.onnx")
    monkeypatch.undo()
    assert result(tmp_path / "g.onnx") == 1.0
    monkeypatch.setattr(write, "EXTERNAL_THRESHOLD", 0)
    write_graph(graph(3.0), tmp_path / "g.onnx")
    assert result(tmp_path / "g.onnx") == 3.0
    assert names(tmp_path) == ["g.onnx", "g.onnx.other.data"]


def test_what_stands_there_may_be_no_graph(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_text("no graph")
    write_graph(graph(1.0), tmp_path / "g.onnx")
    assert result(tmp_path / "g.onnx") == 1.0
