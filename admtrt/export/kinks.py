"""PyTorch's gradient where a function has none, as far as an operator of ONNX does not tell.

Several functions of PyTorch become the same operator and differ at ties and ends alone. A captured node says
which one it is from (:data:`admtrt.export.nodes.ATEN`).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from admtrt.export.nodes import ATEN

if TYPE_CHECKING:
    import onnx_ir as ir


def is_clamp(node: ir.Node) -> bool:
    """True for a Max, Min or Clip that bounds its first input; Max and Min otherwise treat both alike."""
    return _function(node).startswith("clamp")


def passes_at_ends(node: ir.Node) -> bool:
    """True where the gradient passes at the bounds themselves of a Clip, or of a Max and a Min that clamp.

    ReLU6 and Hardtanh have 0 there; clamp, which a Clip is taken for, has what this release of PyTorch has.
    """
    return _function(node).split(".")[0] not in ("relu6", "hardtanh") and _clamp_passes()


def first_of_equals(node: ir.Node) -> bool:
    """True where all of the gradient of a ReduceMax or ReduceMin goes to the first of equal values."""
    return _function(node) in ("max.dim", "min.dim")


def finite_at_zero(node: ir.Node) -> bool:
    """True where the slope of a power is 0 at 0 where it would be infinite."""
    return _function(node).startswith("linalg_vector_norm")


def _function(node: ir.Node) -> str:
    return str(node.meta.get(ATEN, ""))


@cache
def _clamp_passes() -> bool:
    """1 at its ends up to torch 2.13, 0 from 2.14 on."""
    with torch.enable_grad():
        end = torch.ones(1, requires_grad=True)
        (slope,) = torch.autograd.grad(end.clamp(0, 1).sum(), end)
    return bool(slope)
