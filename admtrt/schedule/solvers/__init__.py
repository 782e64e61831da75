"""Solvers, one file per family. Each turns a sampler's choices into rows, one per network evaluation.

To add one, write its file here (a function of ``(levels, sampler, start)`` that returns
:class:`~admtrt.schedule.rows.Rows`, declared by :func:`solver`, with its equation in the docstring), import
it below, write its paper form in ``models/solvers/``, a case in ``tests/parity/test_solver_order.py`` and a
line in ``docs/solvers.md``. The command line, the checks, ``verify`` and ``docs/cli.md`` follow from the
declaration.
"""

from __future__ import annotations

from admtrt.schedule.solvers import consistency, ddim, ddpm, dpmpp, heun, sa, unipc
from admtrt.schedule.solvers.registry import SOLVERS, Solver, solver_named

__all__ = [
    "SOLVERS", "Solver", "consistency", "ddim", "ddpm", "dpmpp", "heun", "sa", "solver_named", "unipc",
]  # fmt: skip
