"""The registry of solvers: which options and processes each supports."""

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
"""Kinds of ``edm`` networks: diffusion models, and consistency models with their boundary condition."""


class RowsOf(Protocol):
    """The pure function that makes a solver's rows."""

    def __call__(self, levels: NoiseLevels, sampler: SamplerConfig, start: Level | None) -> Rows:
        """The rows of one sample.

        Args:
            levels: the noise levels of the process.
            sampler: the choices; ``sampler.option(name)`` falls back to the solver's default.
            start: the level of an image to start from; None starts from pure noise.

        Raises:
            RequestError: for an impossible number of steps, or a grid that the process does not have.
        """
        ...


@dataclass(frozen=True)
class Solver:
    """A family of solvers.

    Attributes:
        name: the ``method`` of a sampler.
        rows: see :class:`RowsOf`.
        options: the options that it takes, with their defaults.
        narrower: by option, the values that it takes if not all.
        processes: the kinds of process that it supports.
        steps: meaning of ``steps``: a respacing, with one evaluation per step, or a number of network
            evaluations.
        default_steps: number of steps when a sampler is switched from another method whose steps do not fit.
        edm_steps: the same for networks of kind ``edm``, if different.
        own_of: kind of ``edm`` networks that the method was made for.
        implied_by: prefix of ``steps`` that implies this method on a discrete process if no method is given;
            the longest matching prefix wins. None if nothing implies it.
        source: paper and equations.
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
"""Name of the method that stands for the bundle's recommendation."""
SOLVERS: dict[str, Solver] = {}
"""Every solver by name."""


def solver(name: str, **declared: Any) -> Callable[[RowsOf], RowsOf]:
    """Declare a solver; the keywords are those of :class:`Solver`.

    Raises:
        ValueError: if the name is taken. Which of the two wins would depend on the order of imports.
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
        ValueError: if there is none, naming the most similar one.
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
    """The method implied by ``steps`` without a method, on a discrete process."""
    begins = steps.strip().startswith
    implied = {one.implied_by: one for one in SOLVERS.values() if one.implied_by is not None}
    return implied[max(filter(begins, implied), key=len)]


def takers(option: str) -> str:
    """The names of the solvers that take an option, joined for a message."""
    return ", ".join(name for name, one in SOLVERS.items() if option in one.options)
