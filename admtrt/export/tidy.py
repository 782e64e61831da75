"""Exact simplifications of the graphs of PyTorch's exporter.

PyTorch's own optimisation (``torch.onnx.export(optimize=True)``) is not used: its patterns compare constants
with a tolerance, so that it deletes ``+ 1e-8`` and ``* 1.000005``, and other rewrites change gradients at
ties and ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
)
from onnxscript.optimizer import fold_constants

from admtrt.export.passes import remove_unused

if TYPE_CHECKING:
    import onnx_ir as ir

_LARGEST = 2**24  # elements of the largest constant to fold


def tidy(model: ir.Model) -> None:
    """Fold constants, replace sequence operators, and merge equal nodes."""
    changed = True
    while changed:  # each pass removes one sequence operator
        changed = bool(
            fold_constants(
                model, onnx_shape_inference=True, input_size_limit=_LARGEST, output_size_limit=_LARGEST
            )
        )
        IdentityEliminationPass()(model)
        remove_unused(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    CommonSubexpressionEliminationPass()(model)
