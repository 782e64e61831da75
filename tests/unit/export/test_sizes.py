"""Sizes that do not depend on the batch become constants; sizes that depend on it do not change."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_graphs import op_types, parse, proto, run
from vjp_cases.case import ints

from admtrt.export.passes import infer_shapes, remove_unused
from admtrt.export.sizes import compute_sizes

CONSTANTS = {
    "zero": np.int64(0), "one": np.int64(1), "two": np.int64(2), "at": ints(0), "first": ints(1),
    "end": ints(3), "pair": ints(1, 2), "minus": ints(-7), "second": ints(2),
}  # fmt: skip


def computed(body: str, rank: int = 1) -> ir.Model:
    """The graph of a body that computes ``out`` from x [N, 4, 6], after the pass; its value is compared."""
    axes = ", ".join("?" for _ in range(rank))
    source = parse(f"g (float[N, 4, 6] x) => (float[{axes}] out) {{ {body} }}", CONSTANTS)
    model = ir.serde.deserialize_model(source)
    infer_shapes(model)
    compute_sizes(model)
    remove_unused(model)
    x = np.random.default_rng(0).standard_normal((3, 4, 6)).astype(np.float32)
    np.testing.assert_array_equal(run(proto(model), x=x)["out"], run(source, x=x)["out"])
    return model


@pytest.mark.parametrize(
    ("body", "value"),
    [
        ("s = Shape (x) n = Gather (s, two) out = Cast <to = 1> (n)", 6),
        ("s = Shape <start = 1> (x) n = Slice (s, at, first) out = Cast <to = 1> (n)", 4),
        ("s = Shape (x) n = Gather (s, pair) m = Mul (n, n) out = Cast <to = 1> (m)", 16),
        (
            "s = Shape (x) n = Gather (s, one) m = Sub (n, minus) d = Div (minus, m) out = Cast <to = 1> (d)",
            0,
        ),
        ("s = Shape (x) n = Gather (s, zero) out = Cast <to = 1> (n)", None),  # the batch
    ],
)
def test_arithmetic(body: str, value: int | None) -> None:
    rank = 0 if "(s, two)" in body or "(s, zero)" in body else 1
    operators = op_types(proto(computed(body, rank)))
    assert (operators == ["Cast"]) == (value is not None)


def test_a_target_with_the_batch_in_it() -> None:
    body = """s = Shape (x) n = Slice (s, at, first) c = Slice (s, first, end) a, b = Split (c) m = Mul (a, b)
        k = Concat <axis = 0> (n, m) out = Reshape (x, k)"""
    model = computed(body.replace("a, b = Split (c) m = Mul (a, b)", "m = ReduceProd (c)"), 2)
    assert "Concat" in op_types(proto(model))  # a product of sizes is none of the known operators
    body = """s = Shape (x) n = Slice (s, at, first) a = Gather (s, first)
        b = Gather (s, second) m = Mul (a, b) k = Concat <axis = 0> (n, m) out = Reshape (x, k)"""
    assert op_types(proto(computed(body, 2))) == ["Reshape"]
