"""Cases of reductions and running sums."""

from __future__ import annotations

import numpy as np
import torch

from vjp_cases.case import Case, ints


def running(x: torch.Tensor, exclusive: bool, reverse: bool) -> torch.Tensor:
    x = x.flip(-1) if reverse else x
    total = x.cumsum(-1) - (x if exclusive else 0)
    return total.flip(-1) if reverse else total


CASES = [
    *(
        Case(op, (3, 4), f"y = {op} <keepdims = {keep}> (x, axis)", reference, {"axis": ints(2, -2)})
        for keep in (0, 1)
        for op, reference in {
            "ReduceSum": lambda x, axis, keep=bool(keep): x.sum((1, 2), keepdim=keep),
            "ReduceMean": lambda x, axis, keep=bool(keep): x.mean((1, 2), keepdim=keep),
            "ReduceSumSquare": lambda x, axis, keep=bool(keep): (x**2).sum((1, 2), keepdim=keep),
            "ReduceL2": lambda x, axis, keep=bool(keep): (x**2).sum((1, 2), keepdim=keep).sqrt(),
            "ReduceLogSumExp": lambda x, axis, keep=bool(keep): x.logsumexp((1, 2), keepdim=keep),
            "ReduceL1": lambda x, axis, keep=bool(keep): x.abs().sum((1, 2), keepdim=keep),
            "ReduceMax": lambda x, axis, keep=bool(keep): x.amax((1, 2), keepdim=keep),
            "ReduceMin": lambda x, axis, keep=bool(keep): x.amin((1, 2), keepdim=keep),
        }.items()
    ),
    Case(
        "ReduceMax",
        (3, 4),
        "r = Relu (x) n = Neg (r) y = ReduceMax (n, axis)",
        lambda x, axis: (-x.relu()).amax(2, True),
        {"axis": ints(2)},
    ),  # zeros share,
    Case("ReduceSum", (4,), "s = ReduceSum (x) y = Mul (x, s)", lambda x: x * x.sum()),
    *(
        Case(
            "ReduceLogSum",
            (3, 4),
            f"y = ReduceLogSum <keepdims = {keep}> (x, axis)",
            lambda x, axis, keep=bool(keep): x.sum(2, keepdim=keep).log(),
            {"axis": ints(2)},
            positive=True,
        )
        for keep in (0, 1)
    ),
    Case("GlobalMaxPool", (2, 3, 4), "y = GlobalMaxPool (x)", lambda x: x.amax((2, 3), keepdim=True)),
    Case("GlobalAveragePool", (2, 3, 4), "y = GlobalAveragePool (x)", lambda x: x.mean((2, 3), keepdim=True)),
    *(
        Case(
            "CumSum",
            (3, 4),
            f"y = CumSum <exclusive = {exclusive}, reverse = {reverse}> (x, c)",
            lambda x, c, e=exclusive, r=reverse: running(x, bool(e), bool(r)),
            {"c": np.int64(-1)},
        )
        for exclusive in (0, 1)
        for reverse in (0, 1)
    ),
    Case(
        "ReduceProd",
        (3, 4),
        "r = Relu (x) y = ReduceProd <keepdims = 0> (r, c)",
        lambda x, c: x.relu().prod(1),
        {"c": ints(1)},
    ),  # with zeros,
    Case("ReduceProd", (3, 4), "y = ReduceProd (x, c)", lambda x, c: x.prod(2, True), {"c": ints(-1)}),
]
