"""Cases of sampling at computed places."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch.nn import functional as F

from vjp_cases.case import Case, ints, normal

GRID = np.tanh(normal(1, 5, 3, 2, seed=4)) * np.float32(2.3)  # many places lie outside
PADDINGS = ("zeros", "border", "reflection")


def sampled(x: torch.Tensor, grid: torch.Tensor, mode: str, padding: str, aligned: bool) -> torch.Tensor:
    grid = grid.expand(len(x), -1, -1, -1)
    return F.grid_sample(x, grid, mode, padding, align_corners=aligned)


def options(mode: str, padding: str, aligned: bool) -> str:
    return f'mode = "{mode}", padding_mode = "{padding}", align_corners = {int(aligned)}'


CASES = [
    *(
        Case(
            "GridSample",
            (2, 4, 5),
            "n = Shape <start = 0, end = 1> (x) m = Concat <axis = 0> (n, rest) e = Expand (grid, m)"
            f" y = GridSample <{options(mode, padding, aligned)}> (x, e)",
            lambda x, grid, rest, m=mode, p=padding, a=aligned: sampled(x, grid, m, p, a),
            {"grid": GRID, "rest": ints(5, 3, 2)},
        )
        for mode, padding, aligned in itertools.product(
            ("bilinear", "bicubic", "nearest"), PADDINGS, (False, True)
        )
    ),
    *(
        Case(
            "GridSample",
            (3, 2, 2),
            "z = ReduceSum <keepdims = 0> (x, rest) f = Reshape (z, four) i = Mul (image, f)"
            f" y = GridSample <{options(mode, padding, aligned)}> (i, x)",
            lambda x, image, rest, four, m=mode, p=padding, a=aligned: F.grid_sample(
                image * x.sum((1, 2, 3)).reshape(-1, 1, 1, 1), x, m, p, align_corners=a
            ),
            {"image": normal(1, 2, 4, 5, seed=5), "rest": ints(1, 2, 3), "four": ints(-1, 1, 1, 1)},
        )
        for mode, padding, aligned in (
            *itertools.product(("bilinear", "bicubic"), PADDINGS, (True,)),
            ("bilinear", "reflection", False),
            ("bicubic", "border", False),
            ("bicubic", "reflection", False),
            ("nearest", "zeros", False),
        )
    ),  # the places depend on x as well
]
