"""The gate in front of a bundle: every way to fail it, and a graph that passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx_graphs import parse
from rtx import NEEDS_RTX

from admtrt.contract import GraphSpec, TensorSpec
from admtrt.errors import ExportError, MissingDependencyError
from admtrt.export import check
from admtrt.export.check import check_graph, rtx_parser_errors

if TYPE_CHECKING:
    from pathlib import Path

BATCH = 7
SPEC = GraphSpec(
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=("N", 3, 4)),
        TensorSpec(name="k", dtype="int64", shape=("N",)),
    ),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("N", 12)),),
)
INPUTS = "float[N, 3, 4] x, int64[N] k"
OUTPUTS = "float[N, 12] y"


def checked(path: Path, model: onnx.ModelProto) -> None:
    onnx.save(model, path / "g.onnx")
    check_graph(path / "g.onnx", SPEC, example_batch=BATCH)


def graph(
    body: str, inputs: str = INPUTS, outputs: str = OUTPUTS, **constants: np.ndarray
) -> onnx.ModelProto:
    return parse(f"g ({inputs}) => ({outputs}) {{ {body} }}", constants)


@pytest.mark.parametrize(
    "body",
    [
        "y = Flatten (x)",
        "z = ScatterElements <axis = 1> (x, i, u) y = Flatten (z)",  # no reduction: plain
        "r = Unsqueeze (x, axes) s = Shape (r) v = Expand (r, s) y = Flatten (v)",  # [7] is a rank here
        "c = Expand (u, seven) d = ReduceSum (c) z = Add (x, d) y = Flatten (z)",  # here a constant
    ],
)
def test_good_graphs_pass(body: str, tmp_path: Path) -> None:
    constants = {"i": np.zeros((1, 1, 1), np.int64), "u": np.zeros((1, 1, 1), np.float32)}
    constants |= {"axes": np.int64([3, 4, 5, 6]), "seven": np.int64([7, 1, 1])}
    checked(tmp_path, graph(body, **constants))


@pytest.mark.parametrize(
    ("inputs", "outputs", "body", "message"),
    [
        (INPUTS.replace("x", "z"), OUTPUTS, "y = Flatten (z)", r"inputs are \[\('z', 1, \('N', 3, 4\)\)"),
        (INPUTS.replace("int64", "int32"), OUTPUTS, "y = Flatten (x)", r"\('k', 6, \('N',\)\)"),
        (INPUTS.replace("N, 3", "7, 3"), "float[7, 12] y", "y = Flatten (x)", r"\('x', 1, \(7, 3, 4\)\)"),
        ("float[N, 3, 4] x", OUTPUTS, "y = Flatten (x)", "inputs are"),
        ("int64[N] k, float[N, 3, 4] x", OUTPUTS, "y = Flatten (x)", "inputs are"),
        (INPUTS, "float[M, 12] y", "y = Flatten (x)", r"outputs are \[\('y', 1, \('M', 12\)\)\]"),
        (INPUTS, f"{OUTPUTS}, float[N, 3, 4] z", "y = Flatten (x) z = Neg (x)", "outputs are"),
    ],
)  # fmt: skip
def test_other_inputs_or_outputs(inputs: str, outputs: str, body: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        checked(tmp_path, graph(body, inputs, outputs))


def test_invalid_graphs(tmp_path: Path) -> None:
    for body in ("y = Flatten (nowhere)", "y = Nothing (x)", "z = MatMul (x, w) y = Flatten (z)"):
        with pytest.raises(ExportError, match=r"g\.onnx is not a valid graph"):
            checked(tmp_path, graph(body, w=np.ones((5, 4), np.float32)))
    (tmp_path / "g.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match="not a valid graph"):
        check_graph(tmp_path / "g.onnx", SPEC, example_batch=BATCH)


@pytest.mark.parametrize("op", ["ScatterElements", "ScatterND"])
def test_scatter_with_reduction(op: str, tmp_path: Path) -> None:
    indices = np.zeros((1, 1, 1), np.int64)
    updates = np.zeros((1, 1, 1) if op == "ScatterElements" else (1, 1, 3, 4), np.float32)
    body = f'z = {op} <reduction = "add"> (x, i, u) y = Flatten (z)'
    with pytest.raises(ExportError, match=rf"is a {op} with reduction 'add'"):
        checked(tmp_path, graph(body, i=indices, u=updates))


def test_control_flow(tmp_path: Path) -> None:
    branches = "then_branch = a () => (u) { u = Flatten (x) }, else_branch = b () => (v) { v = Flatten (x) }"
    body = f"y = If (flag) <{branches}>"
    with pytest.raises(ExportError, match=r"is control flow \(If\)"):
        checked(tmp_path, graph(body, flag=np.array(True)))


def test_other_domains(tmp_path: Path) -> None:
    model = graph("z = Neg (x) y = Flatten (z)")
    model.graph.node[0].domain = "com.example"
    model.opset_import.add(domain="com.example", version=1)
    with pytest.raises(ExportError, match=r"comes from the domain 'com\.example'"):
        checked(tmp_path, model)


def test_local_functions(tmp_path: Path) -> None:
    model = graph("y = Flatten (x)")
    nodes = [onnx.helper.make_node("Neg", ["a"], ["b"])]
    opsets = [onnx.helper.make_opsetid("", 18)]
    model.functions.append(onnx.helper.make_function("com.example", "f", ["a"], ["b"], nodes, opsets))
    model.opset_import.add(domain="com.example", version=1)
    with pytest.raises(ExportError, match="local functions"):
        checked(tmp_path, model)


@pytest.mark.parametrize("batch", [BATCH, 5])
def test_frozen_batch(batch: int, tmp_path: Path) -> None:
    body = "z = Reshape (x, frozen) y = Reshape (z, free)"
    model = graph(body, frozen=np.int64([batch, 12]), free=np.int64([-1, 12]))
    if batch == BATCH:
        with pytest.raises(ExportError, match="'z' is fixed to the traced batch of 7"):
            checked(tmp_path, model)
    else:
        checked(tmp_path, model)  # another constant size is not the example's


def absent(flavor: str) -> None:
    raise MissingDependencyError(flavor, extra="rtx", purpose="this")


def test_rtx_parser_is_optional(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "find_library", absent)
    assert rtx_parser_errors(tmp_path / "g.onnx") is None


@NEEDS_RTX
def test_rtx_parser_errors_are_reported(tmp_path: Path) -> None:
    onnx.save(graph("y = Flatten (x)"), tmp_path / "good.onnx")
    assert rtx_parser_errors(tmp_path / "good.onnx") == []
    bad = graph("z = Neg (x) y = Flatten (z)")
    bad.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(bad, tmp_path / "bad.onnx")
    errors = rtx_parser_errors(tmp_path / "bad.onnx")
    assert errors
    assert "NoSuchOperator" in "".join(errors)
