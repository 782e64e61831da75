"""The sampler that the measurements recommend, in one place with its reason.

``admtrt export --method auto`` writes it into the bundle, and ``admtrt sample --method auto`` takes it from
there.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from admtrt.config import EdmConfig
from admtrt.schedule.solvers.registry import own_solver

if TYPE_CHECKING:
    from collections.abc import Mapping

    from admtrt.config import DiffusionConfig

DISCRETE: Mapping[str, Any] = MappingProxyType({"method": "sa", "order": 3, "steps": "10"})
"""SA-Solver of order 3, 10 evaluations: the tables of ``docs/solvers.md`` (``tools/solver_table.py``).

On the digits and on Fashion-MNIST it has the accuracy and diversity of DDPM's 250 steps within the error of
the measure. Deterministic solvers come as near on the digits; on Fashion-MNIST, whose network is less sure of
x_0 at high noise, they keep its first errors to the end and lose 10 to 20 points of accuracy; fresh noise
forgets them.
"""


def recommended_choices(process: DiffusionConfig | EdmConfig) -> Mapping[str, Any]:
    """Method, steps and options for networks of a process; scale and bound are the checkpoint's matter.

    Networks of kind ``edm`` get the method that they are made for.
    """
    if not isinstance(process, EdmConfig):
        return DISCRETE
    own = own_solver(process)
    return {"method": own.name, "steps": own.edm_steps or own.default_steps}
