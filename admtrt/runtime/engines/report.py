"""Read the builder's log: count kernels by kind, fused ones, and those that only move data.

The wording of the log is not documented. Unknown lines count as "other", and nothing depends on the counts.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from admtrt.config_base import Config

if TYPE_CHECKING:
    from collections.abc import Iterable

_LAYER = re.compile(r"Name: (\S+), LayerType: (\w+)")
_GENERATED = re.compile(r"^__myl_(.+?)_myl\d+_\d+$")
_WORDS = re.compile(r"[A-Z][a-z]*")
_MOVES = frozenset({"Move", "Tran", "Resh", "Repl", "Conc", "Slic", "Pad", "Cast", "Unsq", "Sque"})
_CONVOLUTIONS = ("correlation", "deconv", "convolution")
_PRODUCTS = ("gemm", "matmul")
_ROLES = {"Corr": "convolutions", "Deco": "convolutions", "Fc": "products", "Maxr": "softmax"}
_FUSED_ATTENTION = "_mha_"
_SHAPES_ONLY = "shape_call"


class FusionReport(Config):
    """Counts of one engine's kernels.

    Attributes:
        kernels: all of them.
        convolutions, products: kernels of convolutions and of matrix products, without fused attention.
        attention: fused attention, which never stores the attention matrix.
        normalisation_silu: group norm and SiLU in one.
        normalisation: group norm without SiLU.
        softmax: separate softmax kernels, a sign of attention that was not fused.
        casts: kernels that only convert types.
        moves: kernels that only copy, reshape or transpose.
        other: everything else, mostly elementwise.
        kinds: counts by the builder's own names.
    """

    kernels: int
    convolutions: int
    products: int
    attention: int
    normalisation_silu: int
    normalisation: int
    softmax: int
    casts: int
    moves: int
    other: int
    kinds: dict[str, int]


def fusion_report(lines: Iterable[str]) -> FusionReport:
    """Count the kernels in a log's lines. Lines that do not describe layers are ignored."""
    layers = [match.groups() for line in lines if (match := _LAYER.search(line))]
    layers = [(name, kind) for name, kind in layers if kind != _SHAPES_ONLY]
    counts = Counter(_role(name, kind) for name, kind in layers)
    counted: dict[str, Any] = {field: counts[field] for field in FusionReport.model_fields}
    kinds = Counter(kind for _, kind in layers)
    return FusionReport(**counted | {"kernels": len(layers), "kinds": dict(sorted(kinds.items()))})


def _role(name: str, kind: str) -> str:
    if _FUSED_ATTENTION in name:
        return "attention"
    if any(part in kind.lower() for part in _CONVOLUTIONS):
        return "convolutions"
    if any(part in kind.lower() for part in _PRODUCTS):
        return "products"
    generated = _GENERATED.match(name)
    words = set(_WORDS.findall(generated[1])) if generated else set()
    if words & {"Gnor", "Inor"}:
        return "normalisation_silu" if "Silu" in words else "normalisation"
    for word, role in _ROLES.items():
        if word in words:
            return role
    if words == {"Cast"}:
        return "casts"
    return "moves" if words and words <= _MOVES else "other"
