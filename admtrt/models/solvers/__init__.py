"""The paper form of every solver: textbook loops in the papers' notation, one file per family.

They share noise levels and grids with :mod:`admtrt.schedule`, but not the formulas of its rows, and are the
reference for exported graphs and the runtime. The state and all coefficients have the dtype of x_T.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from admtrt.models.solvers import ancestral
from admtrt.models.solvers.consistency import consistency
from admtrt.models.solvers.dpmpp import dpmpp
from admtrt.models.solvers.heun import euler, heun
from admtrt.models.solvers.problem import Networks, Problem, State
from admtrt.models.solvers.sa import sa
from admtrt.models.solvers.unipc import unipc
from admtrt.schedule.levels import levels_of
from admtrt.schedule.solvers import SOLVERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from admtrt.config import DiffusionConfig, EdmConfig
    from admtrt.models.diffusion import Diffusion
    from admtrt.models.solvers.ancestral import Step
    from admtrt.schedule.sampler import SamplerConfig

__all__ = ["PAPER_FORMS", "STEPS", "Networks", "State", "sample_step", "trajectory"]

PAPER_FORMS: Mapping[str, Callable[[Problem], Iterator[State]]] = {
    "ddpm": ancestral.ddpm,
    "ddim": ancestral.ddim,
    "dpmpp": dpmpp,
    "unipc": unipc,
    "sa": sa,
    "heun": heun,
    "euler": euler,
    "consistency": consistency,
}
"""Every solver by its name in the registry."""
STEPS: Mapping[str, Step] = {"ddpm": ancestral.ddpm_step, "ddim": ancestral.ddim_step}
"""Single steps of the solvers without memory, by name."""


def trajectory(
    process: DiffusionConfig | EdmConfig,
    sampler: SamplerConfig,
    networks: Networks,
    x_T: Tensor,
    noise: Callable[[int], Tensor],
    *,
    start: int | None = None,
    image: Tensor | None = None,
    quantile: float | None = None,
) -> Iterator[State]:
    """Yield lazily the state of each evaluation, then the image.

    Args:
        process, sampler, start: as for :func:`admtrt.schedule.table.sampling_schedule`.
        networks: the networks bound to their conditions.
        x_T: standard normal, [N, C, H, W], float64 for a reference.
        noise: standard normal noise, by the number of evaluations still to come.
        image: the image to start from if ``start`` is given, [N, C, H, W] in [-1, 1].
        quantile: quantile of dynamic thresholds, as for :func:`~admtrt.contract.threshold_quantile`.

    Raises:
        RequestError: if the process cannot be sampled this way.
    """
    level = None
    if start is not None:
        visited = SOLVERS[sampler.method].rows(levels_of(process), sampler, None).levels
        level = visited[len(visited) - start]
    problem = Problem(process, sampler, networks, x_T, noise, level, image, quantile)
    return PAPER_FORMS[sampler.method](problem)


def sample_step(
    diffusion: Diffusion,
    out: Tensor,
    x_t: Tensor,
    step: Tensor,
    noise: Tensor,
    gradient: Tensor | None,
    sampler: SamplerConfig,
) -> tuple[Tensor, Tensor]:
    """One guided step of a solver in :data:`STEPS`, see :class:`~admtrt.models.solvers.ancestral.Step`."""
    return STEPS[sampler.method](diffusion, out, x_t, step, noise, gradient, sampler)
