"""Vector-Jacobian products of ONNX operators, one small function each.

A rule gets the tape, the forward node and the gradients of its outputs (None where nothing flows), and
returns the gradients of its inputs (None where there is none, or where the input is constant in x). It may
use the forward node's inputs and outputs; what it does not use is dropped from the graph afterwards.
"""

from admtrt.export.vjp import (
    elementwise,
    layout,
    normalisation,
    pooling,
    products,
    reductions,
    sampling,
    selection,
    transforms,
)
from admtrt.export.vjp.rule import RULES

__all__ = [
    "RULES", "elementwise", "layout", "normalisation", "pooling", "products", "reductions", "sampling",
    "selection", "transforms",
]  # fmt: skip
