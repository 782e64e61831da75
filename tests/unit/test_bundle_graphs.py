"""The graphs of a bundle: where their weights may lie, and which operators they may have."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from bundles import manifest_of, refusal, sham_bundle

from admtrt.bundle import Bundle


def graph_with_weights_in(location: str) -> bytes:
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [1.0])
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    content: bytes = onnx.helper.make_model(graph).SerializeToString()
    return content


def test_weights_in_a_file_of_the_bundle(tmp_path: Path) -> None:
    path = sham_bundle(
        tmp_path / "bundle", graph=graph_with_weights_in("w.data"), extra={"w.data": bytes(4)}
    ).path
    Bundle.open(path)
    (path / "w.data").write_bytes(b"1234")
    assert "'w.data' has SHA-256" in refusal(path).message


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../w.data", "absent.data", "sub/w.data", "sub/../w.data", "", "w.data\0"]
)
def test_weights_elsewhere(tmp_path: Path, location: str) -> None:
    extra = {"w.data": bytes(4), "sub/w.data": bytes(4)}
    (tmp_path / "w.data").write_bytes(bytes(4))
    path = sham_bundle(tmp_path / "bundle", graph=graph_with_weights_in(location), extra=extra).path
    error = refusal(path)
    assert f"keeps weights in {location!r}, which is not a file of the bundle" in error.message
    assert "Do not run it" in error.hint


def test_weights_behind_a_link_out_of_the_bundle(tmp_path: Path) -> None:
    path = sham_bundle(
        tmp_path / "bundle", graph=graph_with_weights_in("w.data"), extra={"w.data": bytes(4)}
    ).path
    (path / "w.data").rename(tmp_path / "w.data")
    (path / "w.data").symlink_to("../w.data")
    assert "'w.data', which lies outside the bundle" in refusal(path).message


@pytest.mark.parametrize("graph", [b"", b"\x0a", b"not a graph", b"\xff" * 20])
def test_a_graph_that_is_none(tmp_path: Path, graph: bytes) -> None:
    path = sham_bundle(tmp_path / "bundle", graph=graph).path
    assert "an ONNX graph" in refusal(path).message


def test_weights_at_an_address_in_memory(tmp_path: Path) -> None:
    """OpenVINO takes such a name for a pointer, and its offset for the address."""
    marker = "*/_ORT_MEM_ADDR_/*"
    path = sham_bundle(
        tmp_path / "bundle", graph=graph_with_weights_in(marker), extra={"w.data": bytes(4)}
    ).path
    (path / "*" / "_ORT_MEM_ADDR_").mkdir(parents=True)
    (path / "*" / "_ORT_MEM_ADDR_" / "*").symlink_to("../../w.data")
    data = manifest_of(path)
    data["files"][marker] = data["files"]["w.data"]
    assert f"keeps weights in {marker!r}, which is not a file of the bundle" in refusal(path, data).message


# --- operators ------------------------------------------------------------------------------------------


def model(text: str) -> bytes:
    serialized: bytes = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 18, "other" : 1]> {text}'
    ).SerializeToString()
    return serialized


ENDLESS = """g (float[N] x) => (float[N] y) {
    most = Constant <value = int64 {9223372036854775807}> ()
    on = Constant <value = bool {1}> ()
    y = Loop (most, on, x) <body = b (int64 i, bool c, float[N] v) => (bool c2, float[N] w) {
        c2 = Identity (c)
        w = Neg (v)
    }>
}"""
BRANCH = """g (float[N] x, bool c) => (float[N] y) {
    y = If (c) <then_branch = t () => (float[N] a) { a = Neg (x) },
                else_branch = e () => (float[N] b) { b = Abs (x) }>
}"""
FOREIGN = "g (float[N] x) => (float[N] y) { y = other.Gelu (x) }"
FUNCTION = """g (float[N] x) => (float[N] y) { y = Neg (x) }
<domain: "other", opset_import: ["" : 18]> f (a) => (b) { b = Neg (a) }"""


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (ENDLESS, "a graph within the operator 'Loop'"),
        (BRANCH, "a graph within the operator 'If'"),
        (FOREIGN, "the operator 'Gelu' of the domain 'other'"),
        (FUNCTION, "has functions"),
    ],
)
def test_operators_that_no_graph_of_ours_has(tmp_path: Path, text: str, fault: str) -> None:
    path = sham_bundle(tmp_path / "bundle", graph=model(text)).path
    assert fault in refusal(path).message


def test_plain_operators_pass(tmp_path: Path) -> None:
    graph = model("g (float[N] x) => (float[N] y) { a = Neg (x) y = Pow (a, a) }")
    Bundle.open(sham_bundle(tmp_path / "bundle", graph=graph).path)
