"""Each folding pass on a graph that it changes and on ones that it leaves alone; values move by rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_graphs import op_types, parse, proto, run

from admtrt.export.fold import (
    fold_affine_into_conv,
    fold_enlargement_into_conv,
    fold_padding_into_conv,
    fold_pooling_into_conv,
    fold_scale_into_conv,
    fold_scale_shift,
    merge_projections,
)
from admtrt.export.passes import infer_shapes, remove_unused

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx

    Pass = Callable[[ir.Model], bool]

RNG = np.random.default_rng(0)
BATCH = 3  # of the values; the graphs know only N


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def applied(
    run_pass: Pass, body: str, inputs: dict[str, tuple[int, ...]], **constants: Any
) -> onnx.ModelProto:
    """The graph after the pass. Its output ``y`` must not change, and the pass must report its changes."""
    declared = ", ".join(f"float[N, {', '.join(map(str, sizes))}] {name}" for name, sizes in inputs.items())
    source = parse(f"g ({declared}) => (float[] y) {{ {body} }}", constants)
    model = ir.serde.deserialize_model(source)
    infer_shapes(model)
    before = op_types(proto(model))
    changed = run_pass(model)
    remove_unused(model)
    after = proto(model)
    assert changed == (op_types(after) != before)
    feeds = {name: f32(BATCH, *sizes) for name, sizes in inputs.items()}
    expected = run(source, **feeds)["y"]
    np.testing.assert_allclose(run(after, **feeds)["y"], expected, rtol=0, atol=3e-6 * np.abs(expected).max())
    return after


ADAPTIVE = """
    p = Gemm <transB = 1> (e, w, b)
    u = Unsqueeze (p, axes)
    scale, shift = Split <axis = 1, num_outputs = 2> (u)
    {affine}
    k = Add (scale, one)
    m = Mul (z, k)
    y = Add (m, shift)
"""
AFFINE = "a = Mul (n, gamma) z = Add (a, beta)"
PARTS = {
    "w": f32(8, 6), "b": f32(8), "axes": np.int64([2, 3]), "one": np.float32(1),
    "gamma": f32(4, 1, 1), "beta": f32(4, 1, 1),
}  # fmt: skip
SIZES = {"n": (4, 5, 5), "e": (6,)}


def test_the_affine_part_goes_into_the_projection() -> None:
    after = applied(fold_scale_shift, ADAPTIVE.format(affine=AFFINE), SIZES, **PARTS)
    assert op_types(after) == ["Gemm", "Unsqueeze", "Split", "Mul", "Add"]


@pytest.mark.parametrize(
    ("affine", "constants"),
    [
        ("z = Identity (n)", {}),  # nothing to fold
        (AFFINE, {"one": np.float32(2)}),  # another form
        (AFFINE + " unused = Neg (z)", {}),
        ("a = Mul (n, gamma) z = Sub (a, beta)", {}),
        (AFFINE, {"gamma": f32(1, 5, 5)}),  # not of the channels
    ],
)
def test_other_forms_keep_their_projection(affine: str, constants: dict[str, Any]) -> None:
    body = ADAPTIVE.format(affine=affine)
    if "unused" in affine:  # a second reader of the affine value
        body = body.replace("y = Add (m, shift)", "s = Add (m, shift) y = Add (s, unused)")
    after = applied(fold_scale_shift, body, SIZES, **PARTS | constants)
    assert op_types(after).count("Add") >= 2


CONV = "a = Mul (n, gamma) z = Add (a, beta) y = Conv {attributes} (z, w{bias})"


@pytest.mark.parametrize(("bias", "kernel"), [("", 1), (", b", 1), (", b", 3)])
def test_the_affine_part_goes_into_the_convolution(bias: str, kernel: int) -> None:
    body = CONV.format(attributes="", bias=bias)
    after = applied(
        fold_affine_into_conv, body, {"n": (4, 5, 5)},
        w=f32(7, 4, kernel, kernel), b=f32(7), gamma=f32(4, 1, 1), beta=f32(4, 1, 1),
    )  # fmt: skip
    assert op_types(after) == ["Conv"]


@pytest.mark.parametrize("attributes", ["<pads = [1, 1, 1, 1]>", '<auto_pad = "SAME_UPPER">', "<group = 2>"])
def test_padding_would_see_another_border(attributes: str) -> None:
    width = 2 if "group" in attributes else 4
    after = applied(
        fold_affine_into_conv, CONV.format(attributes=attributes, bias=", b"), {"n": (4, 5, 5)},
        w=f32(8, width, 3, 3), b=f32(8), gamma=f32(4, 1, 1), beta=f32(4, 1, 1),
    )  # fmt: skip
    assert op_types(after) == ["Mul", "Add", "Conv"]


NEAREST = 'mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"'
ENLARGED = f"u = Resize <{NEAREST}> (x, , scales)"
CONV_3X3 = "y = Conv <pads = [1, 1, 1, 1]> (u, w{bias})"


@pytest.mark.parametrize("bias", ["", ", b"])
@pytest.mark.parametrize("size", [(5, 5), (3, 6), (1, 1)])
def test_an_enlarged_image_is_convolved_at_its_own_size(bias: str, size: tuple[int, int]) -> None:
    after = applied(
        fold_enlargement_into_conv, f"{ENLARGED} {CONV_3X3.format(bias=bias)}", {"x": (4, *size)},
        w=f32(7, 4, 3, 3), b=f32(7), scales=np.float32([1, 1, 2, 2]),
    )  # fmt: skip
    assert op_types(after) == ["Conv"] * 4 + ["Concat", "DepthToSpace"]


def test_an_enlarged_image_that_others_read_stays_for_them() -> None:
    after = applied(
        fold_enlargement_into_conv, f"{ENLARGED} c = Conv <pads = [1, 1, 1, 1]> (u, w) y = Add (u, c)",
        {"x": (4, 5, 5)}, w=f32(4, 4, 3, 3), scales=np.float32([1, 1, 2, 2]),
    )  # fmt: skip
    assert op_types(after).count("Conv") == 4
    assert op_types(after).count("Resize") == 1


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        (f"{ENLARGED} y = Conv (u, w)", {}),
        (f"{ENLARGED} y = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (u, w)", {}),
        (f"{ENLARGED} y = Conv <pads = [2, 2, 2, 2], dilations = [2, 2]> (u, w)", {}),
        (f"{ENLARGED} y = Conv <pads = [1, 1, 1, 1], group = 2> (u, w)", {"w": f32(6, 2, 3, 3)}),
        (f"{ENLARGED} {CONV_3X3.format(bias='')}", {"w": f32(6, 4, 5, 5)}),
        (f"{ENLARGED} {CONV_3X3.format(bias='')}", {"scales": np.float32([1, 1, 3, 3])}),
        (f"{ENLARGED} {CONV_3X3.format(bias='')}", {"scales": np.float32([1, 1, 2, 1])}),
        (f'u = Resize <mode = "linear"> (x, , scales) {CONV_3X3.format(bias="")}', {}),
        (f"u = Neg (x) {CONV_3X3.format(bias='')}", {}),
    ],
)  # fmt: skip
def test_other_enlargements_and_convolutions_stay(body: str, constants: dict[str, Any]) -> None:
    given = {"w": f32(6, 4, 3, 3), "scales": np.float32([1, 1, 2, 2])} | constants
    after = applied(fold_enlargement_into_conv, body, {"x": (4, 5, 5)}, **given)
    assert op_types(after).count("Conv") == 1


POOLED = "y = AveragePool <kernel_shape = [2, 2], strides = [2, 2]{more}> (c)"
CONVOLVED = "c = Conv <pads = [1, 1, 1, 1]> (x, w{bias})"


@pytest.mark.parametrize("bias", ["", ", b"])
@pytest.mark.parametrize("size", [(6, 6), (4, 10), (5, 7), (2, 2)])
def test_a_convolution_whose_results_are_averaged_is_one_of_stride_2(
    bias: str, size: tuple[int, int]
) -> None:
    body = f"{CONVOLVED.format(bias=bias)} {POOLED.format(more='')}"
    after = applied(fold_pooling_into_conv, body, {"x": (4, *size)}, w=f32(7, 4, 3, 3), b=f32(7))
    assert op_types(after) == ["Conv"]


@pytest.mark.parametrize(
    ("body", "weight"),
    [
        (f"{CONVOLVED} {POOLED} ", (6, 4, 5, 5)),
        (f"c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w) {POOLED}", (6, 4, 3, 3)),
        (f"c = Conv (x, w) {POOLED}", (6, 4, 3, 3)),
        (f"c = Conv <pads = [1, 1, 1, 1], group = 2> (x, w) {POOLED}", (6, 2, 3, 3)),
        (f"{CONVOLVED} {POOLED.replace('(c)', '(n)')}".replace("y =", "n = Neg (c) y ="), (6, 4, 3, 3)),
        (f"{CONVOLVED} {POOLED.replace('y =', 'p =')} m = ReduceMax (c) y = Add (p, m)", (6, 4, 3, 3)),
        (f"{CONVOLVED} y = AveragePool <kernel_shape = [2, 2], strides = [1, 1]> (c)", (6, 4, 3, 3)),
        (f"{CONVOLVED} y = AveragePool <kernel_shape = [3, 3], strides = [2, 2]> (c)", (6, 4, 3, 3)),
    ],
)  # fmt: skip
def test_other_averages_and_convolutions_stay(body: str, weight: tuple[int, ...]) -> None:
    given = {"x": (4, 7, 7)}
    after = applied(fold_pooling_into_conv, body.format(bias="", more=""), given, w=f32(*weight))
    assert "AveragePool" in op_types(after)


@pytest.mark.parametrize("more", [", pads = [1, 1, 1, 1]", ", ceil_mode = 1"])
def test_averages_of_other_windows_stay(more: str) -> None:
    body = f"{CONVOLVED.format(bias='')} {POOLED.format(more=more)}"
    after = applied(fold_pooling_into_conv, body, {"x": (4, 7, 7)}, w=f32(6, 4, 3, 3))
    assert "AveragePool" in op_types(after)


LEGACY = "r = Reshape (c, heads) q, k, v = Split <axis = 2, num_outputs = 3> (r)"
NEW = """
    q0, k0, v0 = Split <axis = 1, num_outputs = 3> (c)
    q = Reshape (q0, h)
    k = Reshape (k0, h)
    v = Reshape (v0, h)
"""
SCALED = """
    c = Conv (x, w, b)
    {parts}
    qs = Mul (q, f)
    ks = Mul (g, k)
    kt = Transpose <perm = [0, 1, 3, 2]> (ks)
    s = MatMul (qs, kt)
    y = MatMul (s, v)
"""
QKV = {
    "w": f32(24, 4, 1), "b": f32(24), "heads": np.int64([-1, 2, 12, 5]), "h": np.int64([-1, 2, 4, 5]),
    "f": np.float32(0.5), "g": np.float32(0.25),
}  # fmt: skip


@pytest.mark.parametrize("parts", [LEGACY, NEW], ids=["legacy", "new"])
def test_factors_of_queries_and_keys_go_into_the_weights(parts: str) -> None:
    after = applied(fold_scale_into_conv, SCALED.format(parts=parts), {"x": (4, 5)}, **QKV)
    assert "Mul" not in op_types(after)


def test_a_part_that_others_read_keeps_its_factor() -> None:
    """The keys' factor folds, the queries' stays."""
    body = SCALED.format(parts=LEGACY).replace("y = MatMul (s, v)", "o = Add (q, v) y = MatMul (s, o)")
    assert op_types(applied(fold_scale_into_conv, body, {"x": (4, 5)}, **QKV)).count("Mul") == 1


def test_a_whole_convolution_keeps_its_factor() -> None:
    after = applied(fold_scale_into_conv, "c = Conv (x, w, b) y = Mul (c, f)", {"x": (4, 5)}, **QKV)
    assert "Mul" in op_types(after)


def test_parts_that_share_channels_keep_their_factors() -> None:
    """Each part of a split along the positions contains all channels."""
    body = "c = Conv (x, w, b) l, r = Split <axis = 2> (c, sizes) m = Mul (l, f) y = Concat <axis = 2> (m, r)"
    after = applied(fold_scale_into_conv, body, {"x": (4, 5)}, sizes=np.int64([2, 3]), **QKV)
    assert "Mul" in op_types(after)


PROJECTIONS = """
    p = Gemm <transB = 1> (e, w, b)
    u = Unsqueeze (p, axes)
    scale, shift = Split <axis = 1, num_outputs = 2> (u)
    p2 = Gemm <transB = 1> (e, w2, b2)
    u2 = Unsqueeze (p2, axes)
    m = Mul (n, scale)
    s = Add (m, shift)
    y = Add (s, u2)
"""
TWO = PARTS | {"w2": f32(4, 6), "b2": f32(4)}


def test_projections_of_one_vector_become_one() -> None:
    after = applied(merge_projections, PROJECTIONS, SIZES, **TWO)
    assert op_types(after) == ["Gemm", "Unsqueeze", "Split", "Mul", "Add", "Add"]


def test_projections_of_two_vectors_stay_two() -> None:
    body = PROJECTIONS.replace("(e, w2, b2)", "(d, w2, b2)")
    assert op_types(applied(merge_projections, body, SIZES | {"d": (6,)}, **TWO)).count("Gemm") == 2


def padded(body: str, widths: tuple[int, ...], channels: int = 4) -> list[str]:
    after = applied(
        fold_padding_into_conv,
        f"{body} y = Conv <strides = [2, 2], pads = [1, 0, 0, 0]> (p, w)",
        {"n": (4, 5, 5)},
        w=f32(3, channels, 3, 3),
        widths=np.array(widths),
        one=np.float32(1),
    )
    return op_types(after)


def test_zeros_around_an_image_become_pads_of_the_convolution() -> None:
    assert padded("p = Pad (n, widths)", (0, 0, 0, 0, 0, 0, 1, 1)) == ["Conv"]


@pytest.mark.parametrize(
    ("body", "widths", "channels"),
    [
        ("p = Pad (n, widths)", (0, 1, 0, 0, 0, 1, 0, 0), 6),
        ("p = Pad (n, widths, one)", (0, 0, 0, 0, 0, 0, 1, 1), 4),
        ('p = Pad <mode = "reflect"> (n, widths)', (0, 0, 0, 0, 0, 0, 1, 1), 4),
        ("p = Pad (n, widths)", (0, 0, -1, 0, 0, 0, 1, 1), 4),
    ],
    ids=["channels", "ones", "reflected", "cut"],
)
def test_other_padding_stays(body: str, widths: tuple[int, ...], channels: int) -> None:
    assert padded(body, widths, channels) == ["Pad", "Conv"]
