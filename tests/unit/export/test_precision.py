"""Typing a graph: the float32 nodes of each island, the positions of Casts, and refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_graphs import forward_graph, op_types, parse, proto, run

from admtrt.errors import ExportError
from admtrt.export.differentiate import add_input_gradient
from admtrt.export.engine_form import engine_form
from admtrt.export.passes import infer_shapes
from admtrt.export.precision import DEFAULT_ISLANDS, ISLANDS, lower

if TYPE_CHECKING:
    from collections.abc import Collection

    from admtrt.contract import Precision
    from admtrt.export.precision import Island

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
RNG = np.random.default_rng(0)


def weights(*shape: int) -> Any:
    return RNG.uniform(-0.3, 0.3, shape).astype(np.float32)


# One residual block with attention, named after what its values are.
BLOCK = """
g (float[N, 4, 6, 6] x, float[N] t) => (float[N, 4, 6, 6] y) {
    column = Reshape (t, minus_one_one)
    angles = Mul (column, frequencies)
    cosine = Cos (angles)
    embedding = Gemm <transB = 1> (cosine, projection)
    shift = Reshape (embedding, as_shift)
    entry = Conv <pads = [1, 1, 1, 1]> (x, w)
    norm = InstanceNormalization (entry, gamma, beta)
    shifted = Add (norm, shift)
    sigmoid = Sigmoid (shifted)
    silu = Mul (shifted, sigmoid)
    inner = Conv <pads = [1, 1, 1, 1]> (silu, w)
    total = Add (entry, inner)
    scores = MatMul (total, total)
    weights = Softmax (scores)
    mixed = MatMul (weights, total)
    activated = Sigmoid (mixed)
    last = Conv <pads = [1, 1, 1, 1]> (activated, w)
    y = Mul (last, two)
}
"""
CONSTANTS = {
    "minus_one_one": np.int64([-1, 1]),
    "as_shift": np.int64([-1, 4, 1, 1]),
    "frequencies": weights(1, 3),
    "projection": weights(4, 3),
    "w": weights(4, 4, 3, 3),
    "gamma": weights(4),
    "beta": weights(4),
    "two": np.float32(2),
}
FEEDS = {"x": weights(3, 4, 6, 6), "t": np.float32([1, 500, 999])}
ALWAYS = {"column", "angles", "cosine", "y"}  # and a pointwise operator that only the output reads
KEPT: dict[str, set[str]] = {
    "group_norm": {"norm"},
    "softmax": {"weights"},
    "output": {"last", "activated"},  # includes nodes that feed only these
    "embedding": {"embedding", "shift"},
    "activation": {"shifted", "sigmoid", "silu", "activated"},
    "residual": {"total"},
}


def typed(
    precision: Precision, islands: Collection[Island] = (), text: str = BLOCK, **constants: Any
) -> ir.Model:
    model = ir.serde.deserialize_model(parse(text, CONSTANTS | constants, opset=22))
    infer_shapes(model)
    lower(model, precision, islands)
    onnx.checker.check_model(proto(model), full_check=True)
    return model


def in_float32(model: ir.Model) -> set[str]:
    """Names of the values that other nodes than Casts compute in float32."""
    made = [node.outputs[0] for node in model.graph if node.op_type != "Cast"]
    return {str(value.name) for value in made if value.dtype == FLOAT}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("island", ISLANDS)
def test_each_island_keeps_its_nodes(island: Island, precision: Precision) -> None:
    kept = in_float32(typed(precision, [island]))
    assert kept == ALWAYS | KEPT[island]


def test_without_islands_only_the_timesteps_stay() -> None:
    model = typed("fp16")
    assert in_float32(model) == ALWAYS
    (result,) = model.graph.outputs
    assert (result.name, result.dtype) == ("y", FLOAT)
    assert [value.dtype for value in model.graph.inputs] == [FLOAT, FLOAT]


@pytest.mark.parametrize("islands", [(), DEFAULT_ISLANDS, ISLANDS])
@pytest.mark.parametrize(("precision", "step"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_values(precision: Precision, step: float, islands: Collection[Island]) -> None:
    """About ten roundings in a row: within twenty steps of the narrow type."""
    from admtrt.verify.emulation import emulate

    exact = run(parse(BLOCK, CONSTANTS, opset=22), **FEEDS)["y"]
    model = typed(precision, islands)
    emulate(model)
    found = run(proto(model), **FEEDS)["y"]
    error = np.abs(found - exact).max() / np.abs(exact).max()
    assert 0 < error < 20 * step


def test_constants_are_stored_narrow() -> None:
    model = typed("fp16")
    dtypes = {value.dtype for value in model.graph.initializers.values() if value.dtype != ir.DataType.INT64}
    assert dtypes == {FLOAT, FLOAT16}
    wide = {v.name for v in model.graph.initializers.values() if v.dtype == FLOAT}
    assert wide == {"frequencies", "two"}


def test_fp32_changes_nothing() -> None:
    model = ir.serde.deserialize_model(parse(BLOCK, CONSTANTS, opset=22))
    before = proto(model)
    lower(model, "fp32")
    assert proto(model) == before


def test_a_weight_beyond_fp16() -> None:
    big = weights(4, 4, 3, 3)
    big[0, 0, 0, 0] = 1e5
    with pytest.raises(
        ExportError, match=r"'w' holds 100000, which is beyond the range of fp16\n.*--engine bf16"
    ):
        typed("fp16", w=big)
    typed("bf16", w=big)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", FLOAT16), ("bf16", FLOAT)])
def test_engines_have_no_transposed_convolution_in_bf16(precision: Precision, dtype: ir.DataType) -> None:
    text = (
        "g (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) "
        "{ h = ConvTranspose <pads = [1, 1, 1, 1]> (x, w) y = Neg (h) }"
    )
    (node,) = (node for node in typed(precision, text=text).graph if node.op_type == "ConvTranspose")
    assert node.outputs[0].dtype == dtype


def test_an_unknown_operator_stays_float32() -> None:
    convolution = "Conv <pads = [1, 1, 1, 1]>"
    body = f"a = {convolution} (x, w) h = Erf (a) y = {convolution} (h, w)"
    model = typed("fp16", text=f"g (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {{ {body} }}")
    assert in_float32(model) == {"h"}


def test_a_cast_of_the_graph_itself_takes_the_type_that_its_value_gets() -> None:
    text = (
        "g (float[N, 4] x) => (float[N, 4] y) { h = Cast <to = 10> (x) s = Cast <to = 1> (h) y = Mul (s, s) }"
    )
    model = ir.serde.deserialize_model(parse(text))
    infer_shapes(model)
    lower(model, "bf16")
    infer_shapes(model)  # refuses a value of another type than its Cast says
    x = weights(3, 4)
    np.testing.assert_allclose(run(proto(model), x=x)["y"], x * x, rtol=2e-2)


def test_scales_of_a_resize_stay_float32() -> None:
    text = "g (float[N, 4, 6, 6] x) => (float[N, 4, 12, 12] y) { h = Resize (x, , scales) y = Neg (h) }"
    model = typed("fp16", text=text, scales=np.float32([1, 1, 2, 2]))
    assert model.graph.initializers["scales"].dtype == FLOAT


def gradient(conv_backward: Any) -> ir.Model:
    model = forward_graph("attention")
    add_input_gradient(model, wrt="x", of="log_prob", name="grad", conv_backward=conv_backward)
    return engine_form(model)


@pytest.mark.parametrize("islands", [(), DEFAULT_ISLANDS, ISLANDS], ids=["none", "default", "all"])
@pytest.mark.parametrize(("precision", "backward"), [("fp16", "transposed"), ("bf16", "flipped")])
def test_no_cast_is_in_vain(precision: Precision, backward: str, islands: Collection[Island]) -> None:
    model = gradient(backward)
    lower(model, precision, islands)
    onnx.checker.check_model(proto(model), full_check=True)
    casts = [node for node in model.graph if node.op_type == "Cast"]
    changed = [(node.inputs[0], node.outputs[0].dtype) for node in casts]
    assert len(set(changed)) == len(changed)
    for source, dtype in changed:
        assert source is not None
        assert source.dtype != dtype
        maker = source.producer()
        floats = maker is not None and maker.op_type == "Cast" and maker.inputs[0].dtype in (FLOAT, dtype)
        assert not floats, f"{source.name} was just cast"


def test_the_backward_of_a_group_norm_is_of_its_island() -> None:
    model = gradient("transposed")
    lower(model, "fp16", ["group_norm"])
    means = [node for node in model.graph if node.op_type == "ReduceMean"]
    assert means
    assert {node.outputs[0].dtype for node in means} == {FLOAT}
    products = [node for node in model.graph if node.op_type in ("Conv", "ConvTranspose", "MatMul")]
    assert {node.outputs[0].dtype for node in products} == {FLOAT16}


def test_typing_leaves_other_copies_alone() -> None:
    form = gradient("transposed")
    before = op_types(proto(form)), {value.dtype for node in form.graph for value in node.outputs}
    lower(form.clone(), "fp16", ())
    assert (op_types(proto(form)), {value.dtype for node in form.graph for value in node.outputs}) == before
