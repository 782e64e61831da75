"""Types of the values in configurations: their bounds, and the texts that they are parsed from."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

NONE_IN_TOML = "none"
"""Means None in formats without null."""


def _none_from_text(value: Any) -> Any:
    """None for the words that mean it in formats without null; any other value unchanged."""
    return None if value in (NONE_IN_TOML, "None") else value


def _none_from_flag(value: Any) -> Any:
    """None also for -1, as in the original's flags for numbers of heads."""
    return None if value in (-1, "-1") else _none_from_text(value)


def _list_from_text(value: Any) -> Any:
    """Parse a list in the format of the original's flags: ``1,2,4``, or a single number."""
    if isinstance(value, str):
        return [part.strip() for part in value.strip("()[] ").split(",")]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


Positive = Annotated[int, Field(ge=1, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
BatchSize = Annotated[int, Field(ge=1, le=2**20)]
ImageSize = Annotated[int, Field(ge=1, le=8192)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NoiseLevel = Annotated[float, Field(ge=0.0)]
OptionalPositive = Annotated[Positive | None, BeforeValidator(_none_from_text)]
OptionalSize = Annotated[ImageSize | None, BeforeValidator(_none_from_text)]
OptionalHeads = Annotated[Positive | None, BeforeValidator(_none_from_flag)]
OptionalBeta = Annotated[Annotated[float, Field(gt=0.0, lt=1.0)] | None, BeforeValidator(_none_from_text)]
OptionalGrey = Annotated[Annotated[int, Field(ge=0, le=255)] | None, BeforeValidator(_none_from_text)]
Multipliers = Annotated[tuple[Annotated[float, Field(gt=0, le=1024)], ...], BeforeValidator(_list_from_text)]
Sizes = Annotated[tuple[Positive, ...], BeforeValidator(_list_from_text)]
