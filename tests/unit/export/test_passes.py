"""Each pass on a graph that it changes and on one that it must leave alone; values never change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_graphs import op_types, parse, proto, run
from torch import nn

from admtrt.export import capture, passes
from admtrt.export.capture import graph_from_module
from admtrt.export.passes import (
    constant,
    constant_sizes,
    drop_whole_slices,
    infer_shapes,
    join_before_reshaping,
    merge_reshapes,
    merge_transposes,
    merge_unsqueezes,
    remove_unused,
    share_equal_constants,
    simplify,
    static_reshapes,
    unsqueeze_constants,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx

    Pass = Callable[[ir.Model], bool]

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def applied(run_pass: Pass, text: str, **constants: Any) -> tuple[bool, onnx.ModelProto]:
    """Run a pass and compare outputs; returns whether it reports a change, and the graph."""
    source = parse(text, constants)
    model = ir.serde.deserialize_model(source)
    infer_shapes(model)
    changed = run_pass(model)
    remove_unused(model)
    for name, values in run(source, x=X).items():
        np.testing.assert_array_equal(run(proto(model), x=X)[name], values)
    return changed, proto(model)


def graph(body: str, out: str = "N, 4, 3") -> str:
    return f"g (float[N, 3, 4] x) => (float[{out}] y) {{ {body} }}"


COMPUTED = """
    s = Shape (x)
    b = Slice (s, zero, one)
    target = Concat <axis = 0> (b, rest)
    y = Reshape (x, target)
"""
SLICES = {"zero": np.int64([0]), "one": np.int64([1])}


def test_unsqueeze_constants() -> None:
    body = "w = Unsqueeze (c, axes) y = Mul (x, w)"
    changed, model = applied(unsqueeze_constants, graph(body, "N, 3, 4"), c=X[0, 0], axes=np.int64([-2, 0]))
    assert changed
    assert op_types(model) == ["Mul"]
    assert list(model.graph.initializer[0].dims) == [1, 1, 4]


def test_unsqueeze_constants_leaves_what_is_computed() -> None:
    body = "w = Unsqueeze (x, axes) y = Squeeze (w, axes)"
    changed, _ = applied(unsqueeze_constants, graph(body, "N, 3, 4"), axes=np.int64([1]))
    assert not changed


@pytest.mark.parametrize(("first", "second"), [(1, 0), (1, 3), (2, 1), (-1, 0), (0, -1)])
def test_merge_unsqueezes(first: int, second: int) -> None:
    body = "a = Unsqueeze (x, f) b = Unsqueeze (a, s) c = Tanh (b) y = Reshape (c, whole)"
    changed, model = applied(
        merge_unsqueezes, graph(body), f=np.int64([first]), s=np.int64([second]), whole=np.int64([-1, 4, 3])
    )
    assert changed
    assert op_types(model) == ["Unsqueeze", "Tanh", "Reshape"]


def test_merge_transposes() -> None:
    body = "a = Transpose <perm = [1, 2, 0]> (x) b = Transpose <perm = [2, 1, 0]> (a) y = Tanh (b)"
    changed, model = applied(merge_transposes, graph(body))
    assert changed
    assert op_types(model) == ["Transpose", "Tanh"]
    body = "a = Transpose (x) b = Transpose <perm = [2, 1, 0]> (a) y = Tanh (b)"
    changed, model = applied(merge_transposes, graph(body, "N, 3, 4"))
    assert changed
    assert op_types(model) == ["Tanh"]
    assert not applied(merge_transposes, graph("y = Transpose <perm = [0, 2, 1]> (x)"))[0]


@pytest.mark.parametrize(
    ("start", "end", "step", "dropped"),
    [(0, 4, 1, True), (-4, 2**62, 1, True), (0, 3, 1, False), (-1, -9, -1, False)],
)
def test_drop_whole_slices(start: int, end: int, step: int, dropped: bool) -> None:
    cut = {name: np.int64([value]) for name, value in {"b": start, "e": end, "a": 2, "s": step}.items()}
    sizes = "N, 3, 4" if dropped or step < 0 else "N, 3, 3"
    changed, model = applied(drop_whole_slices, graph("c = Slice (x, b, e, a, s) y = Tanh (c)", sizes), **cut)
    assert changed == dropped
    assert op_types(model) == (["Tanh"] if dropped else ["Slice", "Tanh"])


def test_static_reshapes() -> None:
    changed, model = applied(static_reshapes, graph(COMPUTED), rest=np.int64([4, 3]), **SLICES)
    assert changed
    assert op_types(model) == ["Reshape"]


def test_static_reshapes_leaves_constants_and_two_dynamic_sizes() -> None:
    changed, _ = applied(static_reshapes, graph("y = Reshape (x, c)"), c=np.int64([-1, 4, 3]))
    assert not changed
    square = "e = Flatten <axis = 1> (x) g = Gemm <transB = 1> (e, e) s = Shape (g) y = Reshape (g, s)"
    changed, model = applied(static_reshapes, graph(square, "N, N"))
    assert not changed
    assert "Shape" in op_types(model)


def test_merge_reshapes() -> None:
    body = "a = Reshape (x, c) b = Reshape (a, d) y = Reshape (b, e)"
    sizes = {"c": np.int64([-1, 12]), "d": np.int64([0, 2, 6]), "e": np.int64([0, 4, -1])}
    changed, model = applied(merge_reshapes, graph(body), **sizes)
    assert changed
    assert op_types(model) == ["Reshape"]


def test_merge_reshapes_keeps_what_others_read() -> None:
    body = "a = Reshape (x, c) u = Neg (a) y = Reshape (a, e) z = Identity (u)"
    text = f"g (float[N, 3, 4] x) => (float[N, 4, 3] y, float[N, 12] z) {{ {body} }}"
    changed, model = applied(merge_reshapes, text, c=np.int64([-1, 12]), e=np.int64([0, 4, 3]))
    assert changed
    assert op_types(model).count("Reshape") == 2


@pytest.mark.parametrize("body", ["a = Neg (x) y = Reshape (a, e)", "a = Reshape (x, e) y = Neg (a)"])
def test_merge_reshapes_leaves_single_ones(body: str) -> None:
    assert not applied(merge_reshapes, graph(body), e=np.int64([0, 4, 3]))[0]


JOINED = """
    a = Reshape (x, heads)
    b, c = Split <axis = 1> (a, parts)
    d = Reshape (b, one)
    e = Reshape (c, two)
    y = Concat <axis = {axis}> (d, e)
"""
HEADS = {
    "heads": np.int64([-1, 3, 2, 2]),
    "parts": np.int64([1, 2]),
    "one": np.int64([-1, 2, 2]),
    "two": np.int64([-1, 4, 2]),
}


@pytest.mark.parametrize("axis", [1, -2])
def test_join_before_reshaping(axis: int) -> None:
    body = JOINED.format(axis=axis)
    changed, model = applied(join_before_reshaping, graph(body, "N, 6, 2"), **HEADS)
    assert changed
    assert op_types(model) == ["Reshape", "Split", "Concat", "Reshape"]


@pytest.mark.parametrize(
    ("body", "out", "sizes"),
    [
        (JOINED.format(axis=2), "N, 2, 6", {"parts": np.int64([1, 2]), "two": np.int64([-1, 2, 4])}),
        (JOINED.format(axis=1) + "z = Neg (d)", "N, 6, 2", {}),
        (JOINED.replace("Reshape (c, two)", "Reshape (x, three)").format(axis=1), "N, 8, 2", {}),
        (JOINED.replace("(d, e)", "(d, d)").format(axis=1), "N, 4, 2", {}),
    ],
    ids=["other axes", "another reader", "other merged sizes", "one twice"],
)
def test_join_before_reshaping_leaves_the_rest(body: str, out: str, sizes: Any) -> None:
    text = graph(body, out)
    if "z =" in body:
        text = text.replace("y) {", "y, float[N, 2, 2] z) {", 1)
    given = HEADS | {"three": np.int64([-1, 6, 2])} | sizes
    assert not applied(join_before_reshaping, text, **given)[0]


def test_share_equal_constants() -> None:
    small, large = np.ones((3, 4), np.float32), np.ones((1, 3, 4, 100), np.float32)
    body = "a = Add (x, p) y = Mul (a, q)"
    changed, model = applied(share_equal_constants, graph(body, "N, 3, 4"), p=small, q=small.copy())
    assert changed
    assert len(model.graph.initializer) == 1
    assert not applied(share_equal_constants, graph(body, "N, 3, 4"), p=small, q=2 * small)[0]
    assert not applied(share_equal_constants, graph(body, "N, 3, 4"), p=small, q=small[None])[0]
    body = "u = Unsqueeze (x, three) a = Add (u, p) b = Mul (a, q) y = ReduceSum <keepdims = 0> (b, three)"
    weights = {"p": large, "q": large.copy(), "three": np.int64([3])}
    assert not applied(share_equal_constants, graph(body, "N, 3, 4"), **weights)[0]


def test_remove_unused() -> None:
    changed, model = applied(
        remove_unused, graph("a = Exp (x) b = Add (a, c) y = Neg (x)", "N, 3, 4"), c=np.float32(1)
    )
    assert changed
    assert op_types(model) == ["Neg"]
    assert not model.graph.initializer
    assert not applied(remove_unused, graph("y = Neg (x)", "N, 3, 4"))[0]


def test_constants_never_share_a_name() -> None:
    model = ir.serde.deserialize_model(
        parse(graph("y = Add (x, constant_1)", "N, 3, 4"), {"constant_1": np.float32(1)})
    )
    names = [constant(model.graph, np.int64([value])).name for value in range(3)]
    assert len({*names, "constant_1"}) == 4
    assert set(names) < set(model.graph.initializers)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((ir.SymbolicDim("N"), 3), [-1, 3]),
        ((2, 3), [2, 3]),
        ((ir.SymbolicDim("N"), ir.SymbolicDim("N")), None),
    ],
)
def test_constant_sizes(shape: tuple[Any, ...], expected: list[int] | None) -> None:
    assert constant_sizes(ir.Value(shape=ir.Shape(shape))) == expected
    assert constant_sizes(ir.Value()) is None


class Block(nn.Module):
    """Patterns that the networks' blocks produce: shape arithmetic, nested reshapes, equal constants."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(2)
        mixed = self.norm(flat).reshape(-1, 2, 2, flat.shape[-1])
        return self.norm(mixed.reshape(-1, *x.shape[1:]) * x)


@pytest.mark.parametrize(
    "name", ["static_reshapes", "merge_reshapes", "share_equal_constants", "remove_unused"]
)
def test_every_pass_earns_its_place_in_a_captured_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pass, simplify() leaves a graph with more nodes or constants."""
    with monkeypatch.context() as patch:
        patch.setattr(capture, "simplify", lambda model: None)
        patch.setattr(capture, "compute_sizes", lambda model: False)
        raw = proto(graph_from_module(Block().eval(), {"x": torch.zeros(2, 4, 2, 2)}, ["y"]))

    def simplified_size() -> tuple[int, int]:
        model = ir.serde.deserialize_model(raw)
        simplify(model)
        return len(list(model.graph)), len(model.graph.initializers)

    best = simplified_size()
    monkeypatch.setattr(passes, name, lambda model: False)
    assert simplified_size() > best
