"""Parse parts of a request: whole numbers, and classes by number or name."""

from __future__ import annotations

import operator
import reprlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from admtrt.brief import listed
from admtrt.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from admtrt.bundle import Manifest
    from admtrt.runtime.slots import Labels

_NAMES_SHOWN = 10


def whole_number(value: Any, name: str) -> int:
    """Convert a whole number of any type, including NumPy's, to int; ``name`` is for messages.

    Raises:
        RequestError: for anything else, including ``True``, ``2.0`` and ``"2"``.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise RequestError(f"{name} is {reprlib.repr(value)}; expected a whole number")
    return number


def one_for_each(given: Any, name: str) -> Sequence[Any]:
    """Check that a value is a sequence with one entry per sample, and return it.

    Raises:
        RequestError: if it is a single value or a string.
    """
    if isinstance(given, str | bytes) or not _has_length(given):
        raise RequestError(
            f"{name} is {reprlib.repr(given)}; expected one for each sample",
            hint=f"Write e.g. {name}=[0, 1].",
        )
    sequence: Sequence[Any] = given
    return sequence


def _has_length(given: Any) -> bool:
    try:
        len(given)
    except TypeError:  # 0-dimensional arrays have __len__, which raises
        return False
    return True


def class_index(label: Any, manifest: Manifest) -> int:
    """The index of a class, given by its number (whose range is not checked) or by its name.

    Raises:
        RequestError: for an unknown name, or a value that is neither.
    """
    if not isinstance(label, str):
        return whole_number(label, "a label")
    found = named_class(label, manifest.class_names)
    if found is None:
        known = some_names(manifest.class_names)
        raise RequestError(
            f"class {label!r} is neither a number nor a name of the bundle"
            + (f"; the names are {known}" if known else "")
        )
    return found


def named_class(text: str, names: Sequence[str]) -> int | None:
    """Find a class by its exact name, else by the only name that differs just in case and spaces."""
    return names.index(text) if text in names else _by_folded(tuple(names)).get(_folded(text))


def _folded(name: str) -> str:
    return "".join(name.split()).casefold()


@lru_cache(maxsize=16)
def _by_folded(names: tuple[str, ...]) -> Mapping[str, int | None]:
    """Classes by case-folded name; None marks a folded name that several classes share."""
    found: dict[str, int | None] = {}
    for index, name in enumerate(names):
        folded = _folded(name)
        found[folded] = None if folded in found else index
    return found


def some_names(names: Sequence[object]) -> str:
    """The first names, for messages; empty without names."""
    return listed(names, _NAMES_SHOWN)


def names_of(labels: Labels, names: Sequence[str]) -> list[str]:
    """The class name of each sample, or its number if there are no names."""
    return [names[label] if names else str(label) for label in labels.tolist()]


def numbered_names(names: Sequence[str]) -> str:
    """The first classes as ``0 ant, 1 bee``, for people; empty without names."""
    return some_names([f"{index} {name}" for index, name in enumerate(names)])
