"""Cases of matrix products and transposed convolutions."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from vjp_cases.case import MATRIX, MEAN, VECTOR, Case, ints, mean_of, normal

CASES = [
    *(
        Case(
            "Conv",
            (4, 5, 6),
            f"k = Exp (c) y = Conv <{options}> (x, k)",
            lambda x, c, given=given: F.conv2d(x, c.exp(), **given),
            {"c": normal(6, 4 // given.get("groups", 1), 3, 2)},
        )
        for options, given in (
            ("pads = [1, 1, 1, 1]", {"padding": 1}),
            ("strides = [2, 2], group = 2", {"stride": 2, "groups": 2}),
        )
    ),  # weights that are computed, though not from x
    *(Case("Det", (2, size, size), "y = Det (x)", torch.linalg.det) for size in (1, 2, 3, 5)),
    Case("MatMul", (3, 4), "y = MatMul (x, c)", lambda x, c: x @ c, {"c": MATRIX}),
    Case("MatMul", (4, 2), "y = MatMul (c, x)", lambda x, c: c @ x, {"c": MATRIX.T.copy()}),
    Case(
        "MatMul", (2, 3, 4), "t = Transpose <perm = [0, 1, 3, 2]> (x) y = MatMul (x, t)", lambda x: x @ x.mT
    ),
    Case(
        "MatMul", (2, 3, 4), "t = Transpose <perm = [0, 1, 3, 2]> (x) y = MatMul (t, x)", lambda x: x.mT @ x
    ),
    Case(
        "MatMul",
        (2, 3, 4),
        f"{MEAN} t = Transpose <perm = [0, 1, 3, 2]> (m) y = MatMul (x, t)",
        lambda x, axis: x @ mean_of(x, 1).mT,
        {"axis": ints(1)},
    ),
    Case(
        "MatMul",
        (3, 4),
        "b = ReduceSum <keepdims = 0> (x, axis) t = Transpose (b) y = MatMul (x, t)",
        lambda x, axis: x @ x.sum(0).T,
        {"axis": ints(0)},
    ),
    Case("Gemm", (4,), "y = Gemm (x, c)", lambda x, c: x @ c, {"c": MATRIX}),
    Case(
        "Gemm",
        (5,),
        "y = Gemm <transB = 1> (x, c, d)",
        lambda x, c, d: x @ c.T + d,
        {"c": MATRIX, "d": VECTOR},
    ),
    Case(
        "Gemm",
        (4,),
        "y = Gemm <alpha = 0.5, beta = 2.0> (x, c, x)",
        lambda x, c: 0.5 * x @ c + 2 * x,
        {"c": MATRIX[:, :4]},
    ),
    Case(
        "Gemm",
        (4,),
        f"{MEAN} y = Gemm (x, c, m)",
        lambda x, c, axis: x @ c + mean_of(x, 1),
        {"c": MATRIX, "axis": ints(1)},
    ),
    Case(
        "Gemm",
        (4,),
        "g = Gemm <transA = 1, alpha = 0.5> (x, x) y = MatMul (x, g)",
        lambda x: x @ (0.5 * x.T @ x),
    ),
    Case("Gemm", (4,), "g = Gemm <transB = 1> (x, x) y = MatMul (g, x)", lambda x: x @ x.T @ x),
    Case("Gemm", (4,), "t = Transpose (x) g = Gemm (x, t) y = MatMul (g, x)", lambda x: x @ x.T @ x),
    Case(
        "Gemm",
        (4,),
        "t = Transpose (x) e = Exp (x) g = Gemm <transA = 1, transB = 1> (t, e) y = MatMul (g, x)",
        lambda x: x @ x.exp().T @ x,
    ),
    *(
        Case(
            "ConvTranspose",
            (4, *size),
            f"y = ConvTranspose <{options}> (x, k, b)",
            lambda x, k, b, given=given: getattr(F, f"conv_transpose{x.ndim - 2}d")(x, k, b, **given),
            {"k": normal(4, 6 // given.get("groups", 1), *kernel), "b": normal(6, seed=1)},
        )
        for size, kernel, options, given in (
            ((3, 4), (3, 3), "pads = [1, 1, 1, 1]", {"padding": 1}),
            ((3, 4), (4, 4), "strides = [2, 2], pads = [1, 1, 1, 1]", {"stride": 2, "padding": 1}),
            (
                (3, 4),
                (3, 2),
                "strides = [3, 2], output_padding = [2, 1], group = 2",
                {"stride": (3, 2), "output_padding": (2, 1), "groups": 2},
            ),
            ((5,), (3,), "dilations = [2]", {"dilation": 2}),
        )
    ),
]
