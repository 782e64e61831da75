"""Solver options on the command line, derived from :mod:`admtrt.schedule.options`."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import typer

from admtrt.errors import RequestError
from admtrt.schedule.options import OPTIONS, Option
from admtrt.schedule.solvers import SOLVERS
from admtrt.schedule.solvers.registry import AUTO, takers

if TYPE_CHECKING:
    from collections.abc import Callable

Command = TypeVar("Command", bound="Callable[..., None]")

_PANEL = "Options of solvers"
_PARAMETER = "solver_options"

SolverOptions = dict[str, Any]
"""The given solver options, by name."""


def method_option(purpose: str, *, auto: str = "what the bundle recommends") -> Any:
    """The option ``--method``; ``auto`` describes what that method stands for."""
    implied = [one for one in SOLVERS.values() if one.implied_by is not None]
    named = ", ".join(f"{one.name} for {one.implied_by}N" for one in implied if one.implied_by)
    other = next(one.name for one in implied if not one.implied_by)
    return typer.Option(
        help=f"{purpose}: {', '.join(SOLVERS)}; {AUTO} is {auto}. If only steps are given: "
        f"{named}, else {other}."
    )


def takes_solver_options(command: Command) -> Command:
    """Add an option to a command for each of :data:`OPTIONS`.

    The command receives the given ones as its parameter ``solver_options``, a dictionary by name.
    """

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in OPTIONS}
        parsed = {name: _parsed(OPTIONS[name], value) for name, value in chosen.items() if value is not None}
        command(**given, **{_PARAMETER: parsed})

    own = inspect.signature(command, eval_str=True).parameters.values()
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(option.name, keyword, default=None, annotation=_annotation(option))
        for option in OPTIONS.values()
    ]
    kept = [one.replace(kind=keyword) for one in own if one.name != _PARAMETER]
    wrapped.__signature__ = inspect.Signature([*kept, *added])  # type: ignore[attr-defined]
    return cast("Command", wrapped)


def _annotation(option: Option) -> Any:
    flag = "--" + option.name.replace("_", "-")
    help_text = f"{option.help} ({takers(option.name)})"
    if option.flag:
        named = typer.Option(f"{flag}/--no-{flag[2:]}", help=help_text, rich_help_panel=_PANEL)
        return Annotated[bool | None, named]
    if not option.values:
        return Annotated[
            str | None, typer.Option(flag, help=help_text, metavar=option.metavar, rich_help_panel=_PANEL)
        ]
    listed = "|".join(map(str, option.values))
    named = typer.Option(flag, help=help_text, metavar=listed, rich_help_panel=_PANEL)
    kind = int if isinstance(option.values[0], int) else Literal[option.values]
    return Annotated[kind | None, named]


def _parsed(option: Option, value: Any) -> Any:
    """Parse the text of an option's value."""
    if option.flag or option.values:
        return value
    try:
        return _READERS[option.name](value)
    except ValueError:
        raise RequestError(
            f"--{option.name.replace('_', '-')} {value[:60]!r} is not of the form {option.metavar}"
        ) from None


def _churn(text: str) -> tuple[float, ...]:
    """Parse churn: amount, noise levels and factor. Without levels, every step is churned."""
    parts = [float(part) for part in text.split(":")]
    if len(parts) not in (1, 3, 4):
        raise ValueError
    return (*parts, *_EVERY_LEVEL[len(parts) - 1 :])


_EVERY_LEVEL = (0.0, 1e9, 1.0)
_READERS: dict[str, Callable[[str], Any]] = {
    "eta": float,
    "threshold_max": float,
    "churn": _churn,
    "levels": lambda text: tuple(int(part) for part in text.split(",")),
    "levels_of": int,
}
