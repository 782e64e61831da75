"""Cases of operators that move values about."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from vjp_cases.case import MEAN, Case, ints, mean_of

CASES = [
    Case("Reshape", (3, 4), "y = Reshape (x, c)", lambda x, c: x.reshape(-1, 2, 6), {"c": ints(-1, 2, 6)}),
    Case(
        "Reshape",
        (4,),
        "g = Gemm <transB = 1> (x, x) s = Shape (g) r = Reshape (g, s) y = MatMul (r, x)",
        lambda x: x @ x.T @ x,
    ),
    Case("Flatten", (3, 4), "y = Flatten <axis = 1> (x)", lambda x: x.flatten(1)),
    Case("Squeeze", (1, 4), "y = Squeeze (x, c)", lambda x, c: x.squeeze(1), {"c": ints(1)}),
    Case("Unsqueeze", (4,), "y = Unsqueeze (x, c)", lambda x, c: x[:, None, :, None], {"c": ints(1, 3)}),
    Case("Transpose", (3, 4, 5), "y = Transpose <perm = [0, 2, 3, 1]> (x)", lambda x: x.permute(0, 2, 3, 1)),
    Case("Transpose", (4,), "t = Transpose (x) y = Transpose (t)", lambda x: x),
    Case("Expand", (1, 4), "y = Expand (x, c)", lambda x, c: x.expand(-1, 3, 4), {"c": ints(1, 3, 1)}),
    Case(
        "Expand",
        (4,),
        "z = Expand (x, c) y = ReduceSum <keepdims = 0> (z, axis)",
        lambda x, c, axis: 5 * x,
        {"c": ints(5, 1, 1), "axis": ints(0)},
    ),
    Case(
        "Concat",
        (3, 4),
        f"{MEAN} y = Concat <axis = 1> (m, x)",
        lambda x, axis: torch.cat([mean_of(x, 1), x], 1),
        {"axis": ints(1)},
    ),
    Case(
        "Concat", (3, 4), "e = Exp (x) y = Concat <axis = -1> (x, e)", lambda x: torch.cat([x, x.exp()], -1)
    ),
    Case(
        "Split",
        (6,),
        "a, b, d = Split <axis = 1> (x, c) e = Exp (d) f = ReduceSum <keepdims = 1> (e, one) y = Mul (b, f)",
        lambda x, c, one: x[:, 1:3] * x[:, 3:].exp().sum(1, True),
        {"c": ints(1, 2, 3), "one": ints(1)},
    ),
    Case(
        "Slice",
        (5, 6),
        "y = Slice (x, b, e, a)",
        lambda x, b, e, a: x[:, 1:4, -2:],
        {"b": ints(-2, 1), "e": ints(2**62, 4), "a": ints(2, 1)},
    ),
    Case(
        "Slice",
        (5,),
        "y = Slice (x, b, e, a, s)",
        lambda x, b, e, a, s: x[:, :-1],
        {"b": ints(0), "e": ints(-1), "a": ints(-1), "s": ints(1)},
    ),
    *(
        Case(
            "Slice",
            (7, 6),
            "y = Slice (x, b, e, a, s)",
            lambda x, b, e, a, s, cut=cut: cut(x),
            dict(zip("beas", (ints(*values) for values in given), strict=True)),
        )
        for cut, given in (
            (lambda x: x[:, ::2], ((0,), (2**62,), (1,), (2,))),
            (lambda x: x[:, 1:6:3], ((1,), (6,), (1,), (3,))),
            (lambda x: x[:, 5:6:3], ((5,), (6,), (-2,), (3,))),
            (lambda x: x[:, 1::2, 2:5:2], ((1, 2), (99, 5), (1, 2), (2, 2))),
            (lambda x: x[:, 2:, ::5], ((2, 0), (99, 99), (1, 2), (1, 5))),
            (lambda x: x.flip(1), ((-1,), (-(2**62),), (1,), (-1,))),
            (lambda x: x.flip(1, 2), ((-1, -1), (-99, -99), (1, -1), (-1, -1))),
            (lambda x: x.flip(2)[:, :, 1:5:2], ((4,), (0,), (2,), (-2,))),
        )
    ),
    Case("Tile", (3, 4), "y = Tile (x, c)", lambda x, c: x.repeat(1, 2, 3), {"c": ints(1, 2, 3)}),
    Case("Tile", (3, 4), "y = Tile (x, c)", lambda x, c: x, {"c": ints(1, 1, 1)}),
    Case(
        "DepthToSpace",
        (12, 2, 3),
        'y = DepthToSpace <blocksize = 2, mode = "CRD"> (x)',
        lambda x: F.pixel_shuffle(x, 2),
    ),
    Case(
        "DepthToSpace",
        (12, 2, 3),
        "y = DepthToSpace <blocksize = 2> (x)",
        lambda x: F.pixel_shuffle(x.unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2), 2),
    ),
    Case(
        "SpaceToDepth",
        (3, 4, 6),
        "y = SpaceToDepth <blocksize = 2> (x)",
        lambda x: F.pixel_unshuffle(x, 2).unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2),
    ),
    Case("Trilu", (4, 5), "y = Trilu <upper = 0> (x, k)", lambda x, k: x.tril(1), {"k": np.int64(1)}),
    Case("Trilu", (4, 5), "y = Trilu (x)", lambda x: x.triu()),
]
