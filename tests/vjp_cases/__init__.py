"""One case or more for every gradient rule, a file a kind."""

from vjp_cases import (
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
from vjp_cases.case import Case

CASES = [
    case
    for kind in (
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
    for case in kind.CASES
]

__all__ = ["CASES", "Case"]
