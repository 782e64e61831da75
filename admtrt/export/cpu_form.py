"""The form of a graph that CPUs like: fewer multiplications for the same result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from admtrt.export.fold import fold_enlargement_into_conv
from admtrt.export.passes import simplify

if TYPE_CHECKING:
    import onnx_ir as ir


def cpu_form(model: ir.Model) -> ir.Model:
    """A copy of a captured or differentiated graph as CPUs like it; it shares the weights that stay."""
    made = model.clone()
    if fold_enlargement_into_conv(made):
        simplify(made)
    return made
