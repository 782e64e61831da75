"""A case of a gradient rule: a graph's text and the same function in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Case:
    """``body`` computes y from x [N, *shape]; ``reference(x, **constants)`` computes it in PyTorch."""

    op: str
    shape: tuple[int, ...]
    body: str
    reference: Callable[..., torch.Tensor]
    constants: dict[str, Any] = field(default_factory=dict)
    positive: bool = False
    opset: int = 18

    def __str__(self) -> str:
        return f"{self.op}: {' '.join(self.body.split())}"


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def unary(
    op: str, reference: Callable[..., torch.Tensor], *, positive: bool = False, opset: int = 18
) -> Case:
    return Case(op, (3, 4), f"y = {op} (x)", reference, positive=positive, opset=opset)


def mean_of(x: torch.Tensor, axis: int) -> torch.Tensor:
    return x.mean(axis, keepdim=True)


MEAN = "m = ReduceMean <keepdims = 1> (x, axis)"
SQUARES = "s = ReduceSumSquare <keepdims = 1> (x, axis)"
MATRIX, VECTOR, FACTORS = normal(4, 5, seed=1), normal(4, seed=2), normal(5, 1, 1, seed=3)
SCALE, BIAS = normal(4, seed=4), normal(4, seed=5)
