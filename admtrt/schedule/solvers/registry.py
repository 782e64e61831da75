"""The registry of solvers: what each takes, and what that means."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from admtrt.brief import beginning
from admtrt.schedule.options import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from admtrt.config import EdmConfig
    from admtrt.schedule.levels import Level, NoiseLevels
    from admtrt.schedule.rows import Rows
    from admtrt.schedule.sampler import SamplerConfig

Kind = Literal["discrete", "edm"]
Steps = Literal["respacing", "evaluations"]
EdmNetwork = Literal["diffusion", "consistency"]
"""Of kind ``edm``: a diffusion model, or one that is held to the boundary of consistency models."""


class RowsOf(Protocol):
    """The pure function of a solver."""

    def __call__(self, levels: NoiseLevels, sampler: SamplerConfig, start: Level | None) -> Rows:
        """The rows of one sample.

        Args:
            levels: the noise levels of the process.
            sampler: the choices; ``sampler.option(name)`` has the solver's default where none was made.
            start: the level at which an image is given as a start; None begins at pure noise.

        Raises:
            RequestError: for steps that the solver cannot spend, or a grid that the process has not.
        """
        ...


@dataclass(frozen=True)
class Solver:
    """A family of solvers.

    Attributes:
        name: the ``method`` of a sampler.
        rows: see :class:`RowsOf`.
        options: every option that it takes, with its default.
        narrower: the values of an option that it takes, where those are not all.
        processes: kinds of process that it samples.
        steps: what a number of steps means: a respacing, in which the networks run once a step, or a number
            of evaluations of the networks.
        default_steps: where a sampler comes from another method without a number of steps that fits.
        edm_steps: the same of networks of kind ``edm``, where it is another.
        own_of: networks of kind ``edm`` whose own method it is.
        implied_by: how steps begin that imply it where they come without a method, to a discrete process; the
            longest such beginning counts. None where no steps do.
        source: of its equations.
    """

    name: str
    rows: RowsOf
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    narrower: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    processes: tuple[Kind, ...] = ("discrete",)
    steps: Steps = "evaluations"
    default_steps: str = "10"
    edm_steps: str | None = None
    own_of: EdmNetwork | None = None
    implied_by: str | None = None


AUTO = "auto"
"""The method that a bundle recommends."""
SOLVERS: dict[str, Solver] = {}
"""Every solver by name."""


def solver(name: str, **declared: Any) -> Callable[[RowsOf], RowsOf]:
    """Declare a solver; the keywords are those of :class:`Solver`.

    Raises:
        ValueError: if the name is taken; which of two is offered would depend on the order of imports.
    """

    def register(rows: RowsOf) -> RowsOf:
        if name in SOLVERS:
            raise ValueError(f"there is a solver '{name}', in {SOLVERS[name].rows.__module__}")
        made = Solver(name=name, rows=rows, **declared)
        assert made.options.keys() <= OPTIONS.keys()
        SOLVERS[name] = made
        return rows

    return register


def solver_named(name: str) -> Solver:
    """The solver of this name.

    Raises:
        ValueError: if there is none, naming the nearest.
    """
    if name in SOLVERS:
        return SOLVERS[name]
    near = difflib.get_close_matches(name[:100], SOLVERS, n=1, cutoff=0.5)
    nearest = f"; did you mean '{near[0]}'?" if near else ""
    raise ValueError(f"'{beginning(name, 60)}' is unknown; expected one of {', '.join(SOLVERS)}{nearest}")


def own_solver(process: EdmConfig) -> Solver:
    """The method that networks of kind ``edm`` are made for."""
    network: EdmNetwork = "consistency" if process.boundary else "diffusion"
    (own,) = (one for one in SOLVERS.values() if one.own_of == network)
    return own


def implied_solver(steps: str) -> Solver:
    """The method of steps that are given without one, to a discrete process."""
    begins = steps.strip().startswith
    implied = {one.implied_by: one for one in SOLVERS.values() if one.implied_by is not None}
    return implied[max(filter(begins, implied), key=len)]


def takers(option: str) -> str:
    """The names of the solvers that take an option, for a sentence."""
    return ", ".join(name for name, one in SOLVERS.items() if option in one.options)
