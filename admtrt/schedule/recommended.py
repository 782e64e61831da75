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

DISCRETE: Mapping[str, Any] = MappingProxyType({"method": "dpmpp", "grid": "logsnr", "steps": "10"})
"""DPM-Solver++(2M) on the logSNR grid, of the table in ``docs/solvers.md`` (``tools/solver_table.py``).

From 8 evaluations on it is the nearest to the converged result of the guided ODE, and there it gives DDPM's
250 steps' accuracy and diversity within the error of the measure. SDE-2M is more accurate at 10, at the price
of diversity, which only its 25 evaluations give back.
"""


def recommended_choices(process: DiffusionConfig | EdmConfig) -> Mapping[str, Any]:
    """Method, steps and options for networks of a process; scale and bound are the checkpoint's matter.

    Networks of kind ``edm`` get the method that they are made for.
    """
    if not isinstance(process, EdmConfig):
        return DISCRETE
    own = own_solver(process)
    return {"method": own.name, "steps": own.edm_steps or own.default_steps}
