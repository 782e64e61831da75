"""What messages show of much: the first few of many things, and the beginning of a long text."""

from __future__ import annotations

from collections.abc import Iterable

FEW = 5
"""Things that a message names before it only counts them."""


def few(things: Iterable[object], most: int = FEW) -> list[str]:
    """The first of these things, and how many more there are."""
    every = list(map(str, things))
    return every if len(every) <= most else [*every[:most], f"and {len(every) - most} more"]


def listed(things: Iterable[object], most: int = FEW, *, separator: str = ", ") -> str:
    """The same in one line; empty where there are none."""
    return separator.join(few(things, most))


def beginning(text: str, longest: int) -> str:
    """A text of at most ``longest`` characters, which ends in dots where it was longer."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
