"""Cases of operators that take values at indices, or put them there."""

from __future__ import annotations

import numpy as np
import torch

from vjp_cases.case import Case, ints


def put(x: torch.Tensor, places: torch.Tensor, values: torch.Tensor, how: str) -> torch.Tensor:
    return x.scatter(1, places, values) if how == "none" else x.scatter_add(1, places, values)


CASES = [
    Case(
        "GatherElements",
        (3, 4),
        "i = ArgMax <axis = 1> (x) y = GatherElements <axis = 1> (x, i)",
        lambda x: x.gather(1, x.argmax(1, keepdim=True)),
    ),
    Case(
        "GatherElements",
        (3, 4),
        "r, i = TopK <axis = 1> (x, two) y = GatherElements <axis = 1> (x, i)",
        lambda x, two: x.topk(2, dim=1)[0],
        {"two": ints(2)},
    ),
    *(
        Case(
            "ScatterElements",
            (3, 4),
            "e = Exp (x) u, v = Split <axis = 1> (e, s) z = Shape (u) j = Expand (i, z)"
            f' y = ScatterElements <axis = 1, reduction = "{how}"> (x, j, u)',
            lambda x, i, s, how=how: put(x, i.expand(len(x), -1, -1), x.exp()[:, :2], how),
            {"i": np.int64([[[2, 0, 1, 2], [0, 1, 2, 0]]]), "s": ints(2, 1)},
        )
        for how in ("none", "add")
    ),
    Case("TopK", (5,), "y, i = TopK <axis = 1> (x, k)", lambda x, k: x.topk(3, dim=1)[0], {"k": ints(3)}),
    Case(
        "TopK",
        (4, 3),
        "y, i = TopK <axis = 1, largest = 0> (x, k)",
        lambda x, k: x.sort(dim=1)[0],
        {"k": ints(4)},
    ),
    Case("TopK", (4,), "y, i = TopK (x, k)", lambda x, k: x.amax(1, True), {"k": ints(1)}),
    Case("Gather", (3, 4), "y = Gather <axis = 1> (x, c)", lambda x, c: x[:, 2], {"c": np.int64(2)}),
    Case("Gather", (3, 4), "y = Gather <axis = -1> (x, c)", lambda x, c: x[:, :, 3:], {"c": ints(-1)}),
    Case("Gather", (4, 5), "y = Gather <axis = 1> (x, c)", lambda x, c: x[:, c], {"c": ints(2, 0, 2)}),
    Case(
        "Gather",
        (4, 5),
        "y = Gather <axis = 2> (x, c)",
        lambda x, c: x[:, :, c],
        {"c": ints(2, -1, 0, 2).reshape(2, 2)},
    ),
    Case(
        "GatherND",
        (4, 5),
        "t = Transpose <perm = [1, 2, 0]> (x) p = GatherND (t, c) y = Transpose (p)",
        lambda x, c: x[:, c[:, 0], c[:, 1]],
        {"c": ints(0, 1, 3, -1, 0, 1).reshape(3, 2)},
    ),
    Case(
        "GatherND",
        (4, 5),
        "t = Transpose <perm = [1, 0, 2]> (x) p = GatherND (t, c) y = Transpose <perm = [2, 0, 1, 3]> (p)",
        lambda x, c: x[:, c[..., 0]],
        {"c": ints(0, 1, 3, 3).reshape(2, 2, 1)},
    ),
    Case(
        "Gather",
        (4, 5),
        "z = ArgMax <axis = 1, keepdims = 0> (c) y = Gather <axis = 1> (x, z)",
        lambda x, c: x[:, c.argmax(1)],
        {"c": np.float32([[0, 1, 0, 0], [3, 2, 1, 1], [0, 0, 0, 2]])},
    ),  # places that are computed, though not from x
    Case(
        "Gather",
        (3, 4),
        "a = ArgMax <axis = 2, keepdims = 0> (x) r = ReduceMax <keepdims = 0> (a, c) m = Neg (r)"
        " y = Gather <axis = 2> (x, m)",
        lambda x, c: x[:, :, -x.argmax(2).amax((0, 1))],
        {"c": ints(0, 1)},
    ),
    Case(
        "GatherND",
        (5,),
        "s = Shape <start = 0, end = 1> (x) n = Squeeze (s) r = Range (zero, n, one)"
        " a = ArgMax <axis = 1> (x) u = Unsqueeze (r, at) i = Concat <axis = 1> (u, a)"
        " z = GatherND (x, i) y = Unsqueeze (z, at)",
        lambda x, zero, one, at: x[torch.arange(len(x)), x.argmax(1)][:, None],
        {"zero": np.int64(0), "one": np.int64(1), "at": ints(1)},
    ),  # a label of each sample, as cond_fn picks it
    Case(
        "GatherElements",
        (3, 4),
        "s = Slice (x, zero, two, tail) i = ArgMax <axis = 1> (s) y = GatherElements <axis = 1> (x, i)",
        lambda x, zero, two, tail: x.gather(1, x[:, :, :2].argmax(1, keepdim=True)),
        {"zero": ints(0), "two": ints(2), "tail": ints(2)},
    ),  # of a part of the other axis
    *(
        Case(
            "ScatterND",
            (4, 3),
            "t = Transpose <perm = [1, 0, 2]> (x) e = Exp (t) u, v = Split <axis = 0> (e, s)"
            f' z = ScatterND <reduction = "{how}"> (t, i, u) y = Transpose <perm = [1, 0, 2]> (z)',
            lambda x, i, s, how=how: x.index_put(
                (torch.arange(len(x))[:, None], i[:, 0]), x.exp()[:, :2], accumulate=how == "add"
            ),
            {"i": ints(3, 1).reshape(2, 1), "s": ints(2, 2)},
        )
        for how in ("none", "add")
    ),
]
