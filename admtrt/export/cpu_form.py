"""The CPU form of a graph: the same result with fewer multiplications."""

from __future__ import annotations

from typing import TYPE_CHECKING

from admtrt.export.fold import fold_enlargement_into_conv, fold_pooling_into_conv
from admtrt.export.passes import simplify

if TYPE_CHECKING:
    import onnx_ir as ir


def cpu_form(model: ir.Model) -> ir.Model:
    """Make the CPU form of a captured or differentiated graph: a copy that shares unchanged weights."""
    made = model.clone()
    if any([fold_enlargement_into_conv(made), fold_pooling_into_conv(made)]):
        simplify(made)
    return made
