"""Vector-Jacobian products of ONNX operators, one small function each.

A rule gets the tape, the forward node and the gradients of its outputs (None if an output has no gradient),
and returns the gradients of its inputs (None for a missing input or one that does not depend on x). It may
use the forward node's inputs and outputs. Values that no rule uses are removed from the graph afterwards.
"""

from admtrt.export.vjp import (
    elementwise,
    layout,
    normalisation,
    places,
    pooling,
    products,
    reductions,
    sampling,
    selection,
    transforms,
)
from admtrt.export.vjp.rule import RULES

__all__ = [
    "RULES", "elementwise", "layout", "normalisation", "places", "pooling", "products", "reductions",
    "sampling", "selection", "transforms",
]  # fmt: skip
