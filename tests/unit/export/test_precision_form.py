"""The passes of the engine form, each on a graph that it changes and on one that it must leave alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_graphs import forward_graph, op_types, parse, proto, run

from admtrt.export.engine_form import ENGINE_OPSET, engine_form, fuse_group_norms, put_queries_first
from admtrt.export.passes import infer_shapes, remove_unused

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 8, 4, 5)).astype(np.float32)
CONSTANTS: dict[str, Any] = {
    "groups": np.int64([0, 2, -1]),
    "back": np.int64([-1, 8, 4, 5]),
    "scale": np.float32([1.5, 0.5]),
    "bias": np.float32([0.1, -0.2]),
    "gamma": RNG.standard_normal((8, 1, 1)).astype(np.float32),
    "beta": RNG.standard_normal((1, 8, 1, 1)).astype(np.float32),
    "flat": np.int64([-1, 8, 20]),
    "flat_gamma": RNG.standard_normal((8, 1)).astype(np.float32),
    "flat_beta": RNG.standard_normal((8, 1)).astype(np.float32),
    "whole": RNG.standard_normal((8, 4, 5)).astype(np.float32),
}
NORM = """
    a = Reshape (x, groups)
    b = InstanceNormalization <epsilon = 0.01> (a, scale, bias)
    c = Reshape (b, back)
"""
ATTENTION = """
    p = Softmax <axis = -1> (x)
    q = Transpose <perm = [0, 1, 3, 2]> (p)
"""


def applied(run_pass: Callable[[ir.Model], bool], body: str, out: str) -> tuple[bool, onnx.ModelProto]:
    """Run a pass, which must keep values; returns whether it reports a change, and the graph."""
    source = parse(f"g (float[N, 8, 4, 5] x) => ({out}) {{ {body} }}", CONSTANTS, opset=22)
    model = ir.serde.deserialize_model(source)
    infer_shapes(model)
    changed = run_pass(model)
    remove_unused(model)
    for name, values in run(source, x=X).items():
        np.testing.assert_allclose(run(proto(model), x=X)[name], values, atol=2e-6, rtol=1e-5)
    return changed, proto(model)


@pytest.mark.parametrize(
    ("tail", "rest"),
    [
        ("y = Reshape (d, back)", ["Reshape", "Reshape"]),
        (
            "m = Mul (d, flat_gamma) n = Add (m, flat_beta) y = Reshape (n, back)",
            ["Reshape", "Reshape"],
        ),
        ("y = Neg (c)", ["Neg"]),
        ("m = Mul (c, gamma) n = Add (m, beta) y = Neg (n)", ["Neg"]),
        ("m = Mul (gamma, c) n = Add (beta, m) y = Neg (n)", ["Neg"]),
        ("m = Mul (c, whole) n = Add (m, beta) y = Neg (n)", ["Mul", "Add", "Neg"]),
        ("m = Mul (c, gamma) y = Neg (m)", ["Mul", "Neg"]),
    ],
)
def test_group_norm(tail: str, rest: list[str]) -> None:
    norm = NORM if "(d" not in tail else NORM.replace("c = Reshape (b, back)", "d = Reshape (b, flat)")
    changed, model = applied(fuse_group_norms, norm + tail, "float[N, 8, 4, 5] y")
    assert changed
    assert op_types(model) == ["GroupNormalization", *rest]


@pytest.mark.parametrize(
    ("body", "out"),
    [
        (NORM + "y = Neg (c) z = Neg (b)", "float[N, 8, 4, 5] y, float[N, 2, 80] z"),
        ("y = InstanceNormalization (x, ones, ones)", "float[N, 8, 4, 5] y"),
        (NORM.replace("back", "other") + "y = Neg (c)", "float[N, 4, 8, 5] y"),
        (NORM.replace("groups", "halves") + "y = Neg (c)", "float[N, 8, 4, 5] y"),
    ],
    ids=["its groups are used", "no groups", "reshaped otherwise", "groups of several samples' batch"],
)
def test_group_norm_leaves_others(body: str, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONSTANTS, "ones", np.ones(8, np.float32))
    monkeypatch.setitem(CONSTANTS, "other", np.int64([-1, 4, 8, 5]))
    monkeypatch.setitem(CONSTANTS, "halves", np.int64([-1, 2, 20]))  # [4 N, 2, 20]
    changed, model = applied(fuse_group_norms, body, out)
    assert not changed
    assert "InstanceNormalization" in op_types(model)


def test_queries_first() -> None:
    changed, model = applied(put_queries_first, ATTENTION + "y = MatMul (x, q)", OUT)
    assert changed
    kinds = op_types(model)
    assert kinds == ["Softmax", "Transpose", "MatMul", "Transpose"]
    product = next(node for node in model.graph.node if node.op_type == "MatMul")
    assert product.input[0] == "p"


OUT = "float[N, 8, 4, 4] y"


@pytest.mark.parametrize(
    ("body", "out"),
    [
        (ATTENTION + "y = MatMul (x, q) z = Neg (p)", OUT + ", float[N, 8, 4, 5] z"),
        (ATTENTION + "y = MatMul (q, x)", "float[N, 8, 5, 5] y"),
        (
            "p = Softmax <axis = -1> (x) q = Transpose <perm = [0, 3, 2, 1]> (p) "
            "r = Transpose <perm = [0, 3, 1, 2]> (x) y = MatMul (r, q)",
            "float[N, 5, 8, 8] y",
        ),
    ],
    ids=["its weights are used", "the weights come first", "another transpose"],
)
def test_queries_first_leaves_others(body: str, out: str) -> None:
    assert not applied(put_queries_first, body, out)[0]


def test_form_of_a_captured_graph() -> None:
    captured = forward_graph("attention")
    before = op_types(proto(captured))
    form = engine_form(captured)
    assert form.opset_imports[""] == ENGINE_OPSET
    kinds = op_types(proto(form))
    assert kinds.count("GroupNormalization") == before.count("InstanceNormalization") > 0
    assert op_types(proto(captured)) == before
    feeds = {"x": X[:, :3, :, :4].repeat(2, 2)[:, :, :8].repeat(2, 3)}
    feeds |= {"t": np.float32([1, 300, 999]), "y": np.int64([0, 3, 1])}
    expected = run(proto(captured), **feeds)["log_prob"]
    np.testing.assert_allclose(run(proto(form), **feeds)["log_prob"], expected, rtol=1e-5)
