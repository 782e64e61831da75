"""The registry of solvers."""

from __future__ import annotations

import pytest

from admtrt.schedule.solvers.registry import SOLVERS, solver


def test_a_second_solver_of_a_name_is_refused() -> None:
    first = SOLVERS["ddim"]
    with pytest.raises(ValueError, match=r"there is a solver 'ddim', in admtrt\.schedule\.solvers\."):
        solver("ddim", summary="another")(lambda *_: None)  # type: ignore[arg-type,return-value]
    assert SOLVERS["ddim"] is first
