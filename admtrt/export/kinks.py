"""PyTorch's gradient at ties and ends, where functions are not differentiable.

Several PyTorch functions are exported as the same ONNX operator but have different gradients at ties and
ends. A captured node records its function (:data:`admtrt.export.nodes.ATEN`).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from admtrt.export.nodes import ATEN

if TYPE_CHECKING:
    import onnx_ir as ir


def is_clamp(node: ir.Node) -> bool:
    """True for a Max, Min or Clip that clamps its first input. A plain Max or Min treats both alike."""
    return _function(node).startswith("clamp")


def passes_at_ends(node: ir.Node) -> bool:
    """True if the gradient passes exactly at the bounds of a Clip, or of a Max and a Min that clamp.

    For ReLU6 and Hardtanh it is 0 there. Every other Clip counts as clamp, whose gradient there depends on
    the PyTorch release.
    """
    return _function(node).split(".")[0] not in ("relu6", "hardtanh") and _clamp_passes()


def first_of_equals(node: ir.Node) -> bool:
    """True if the whole gradient of a ReduceMax or ReduceMin goes to the first of equal values."""
    return _function(node) in ("max.dim", "min.dim")


def finite_at_zero(node: ir.Node) -> bool:
    """True if the slope of a power at 0 is taken as 0 instead of infinite."""
    return _function(node).startswith("linalg_vector_norm")


def _function(node: ir.Node) -> str:
    return str(node.meta.get(ATEN, ""))


@cache
def _clamp_passes() -> bool:
    """True if clamp's gradient is 1 at its ends (up to torch 2.13), False if it is 0 (from 2.14 on)."""
    with torch.enable_grad():
        end = torch.ones(1, requires_grad=True)
        (slope,) = torch.autograd.grad(end.clamp(0, 1).sum(), end)
    return bool(slope)
