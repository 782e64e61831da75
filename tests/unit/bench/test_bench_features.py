"""``admtrt bench --features``: rows, counted operations and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from feature_networks import write_graph

from admtrt.bench.feature_rows import count_graph, feature_rows
from admtrt.cli import run
from admtrt.errors import RequestError
from admtrt.evaluate.network import open_network
from admtrt.runtime.backends import backend as declaration


def test_operations_are_those_of_convolutions_and_products(tmp_path: Path) -> None:
    """12 and 8 kernels of 3x3x3 at 64 places, and 12 x 10 weights."""
    fixed = write_graph(tmp_path / "fixed.onnx", size=8)
    assert count_graph(fixed) == 2 * (27 * (12 + 8) * 64 + 12 * 10)
    free = write_graph(tmp_path / "free.onnx")
    assert count_graph(free) == 2 * (27 * (12 + 8) * 256**2 + 12 * 10)


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = open_network(f"tiny={write_graph(tmp_path / 'tiny.onnx', size=8)}")
    assert feature_rows(["openvino:bf16", "onnxruntime"], network) == [
        ("openvino", "bf16"),
        ("onnxruntime", "fp32"),
    ]
    monkeypatch.setattr(declaration, "is_installed", lambda name: name != "openvino")
    assert feature_rows([], network) == [("onnxruntime", "fp32")]
    for names, complaint in (
        (["onnxruntime:bf16"], "no library 'onnxruntime:bf16'"),
        (["tensorrt"], "no library 'tensorrt'"),
        (["torch-fidelity"], "torch-fidelity's network is Inception"),
    ):
        with pytest.raises(RequestError, match=complaint):
            feature_rows(names, network)


def test_a_network_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = write_graph(tmp_path / "tiny.onnx", size=8)
    options = ["--backend", "onnxruntime", "--repeat", "2", "--batch", "3", "--threads", "1", "--json"]
    places = ["--features", f"tiny={graph}", "--out", str(tmp_path / "out")]
    assert run(["bench", *places, *options]) == 0
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    (report,) = data["reports"]
    (row,) = report["rows"]
    assert report["operations"] == count_graph(graph)
    assert (row["row"], row["batch"], row["step"]["count"], row["ratio"]) == ("onnxruntime:fp32", 3, 2, 1)
    assert row["images_per_second"] == pytest.approx(3 / row["step"]["median"])
    peak = report["peaks"]["fp32"]
    assert row["of_peak"] == pytest.approx(row["images_per_second"] * report["operations"] / peak)
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == data


@pytest.mark.parametrize("option", [["--original", "x"], ["--unet", "x"], ["--sampling", "2"]])
def test_options_of_other_benches_are_refused(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = write_graph(tmp_path / "tiny.onnx", size=8)
    assert run(["bench", "--features", f"tiny={graph}", *option]) == 2
    assert f"{option[0]} is nothing of --features" in capsys.readouterr().err
