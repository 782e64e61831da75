"""Short forms for messages: the first few of many things, and the beginning of a long text."""

from __future__ import annotations

from collections.abc import Iterable

FEW = 5
"""Number of things that a message names; it only counts the rest."""


def few(things: Iterable[object], most: int = FEW) -> list[str]:
    """The first ``most`` of these things as text, then how many more there are."""
    every = list(map(str, things))
    return every if len(every) <= most else [*every[:most], f"and {len(every) - most} more"]


def listed(things: Iterable[object], most: int = FEW, *, separator: str = ", ") -> str:
    """The result of :func:`few` in one line; empty if there are no things."""
    return separator.join(few(things, most))


def beginning(text: str, longest: int) -> str:
    """At most ``longest`` characters of a text; a shortened text ends in dots."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
