"""Read values of diffusers' JSON files with type checks; unusable ones are refused by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from admtrt.brief import beginning
from admtrt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path


@dataclass
class Values:
    """The content of a file, completed by the defaults of its class.

    Attributes:
        file: the file, for messages.
        data: the content of the file.
        defaults: default of every key of the class.
        notes: notes for the user.
    """

    file: Path
    data: Mapping[str, Any]
    defaults: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, key: str) -> Any:
        return self.data.get(key, self.defaults[key])

    def refused(self, key: str, reason: str, *, hint: str = "") -> CheckpointError:
        """Make an error with the file, a key, its value and why it cannot be used."""
        value = f"{key} is {shown(self[key])}"
        missing = "" if key in self.data else " (missing, so the default)"
        return CheckpointError(f"{self.file}: {value}{missing}; {reason}", hint=hint)

    def whole(self, key: str, least: int, most: int = 2**31 - 1) -> int:
        """A whole number within bounds."""
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.refused(key, f"expected a whole number, {least} to {most}")
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refused(key, "expected a number")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self[key]
        if not isinstance(value, bool):
            raise self.refused(key, "expected true or false")
        return value

    def choice(self, key: str, known: Mapping[Any, Any], *, hint: str = "") -> Any:
        """Translate one of several allowed values."""
        value = self[key]
        hashable = value is None or isinstance(value, str | int | float)
        if not hashable or value not in known or isinstance(value, bool):
            raise self.refused(key, f"ADM has {_listed(list(known))} alone", hint=hint)
        return known[value]

    def fixed(self, key: str, *expected: Any, reason: str = "") -> None:
        """Refuse a key whose value differs from ADM's fixed value."""
        value = self[key]
        same = any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in expected)
        if not same:
            raise self.refused(key, reason or f"ADM has {_listed(expected)} alone")

    def check_unknown(self, ignored: Collection[str] = ()) -> None:
        """Refuse unknown keys, which may be options of a newer version."""
        for key, value in self.data.items():
            if key in self.defaults or key in ignored or key.startswith("_"):
                continue
            if value is not None and value is not False:
                raise CheckpointError(
                    f"{self.file}: {key[:100]} is {shown(value)}; admtrt does not know this key, which may "
                    "be an option of a newer diffusers"
                )
            self.notes.append(f"{key[:100]} is {shown(value)}, a key that is not known")


def shown(value: Any) -> str:
    """A value as shortened JSON."""
    text = {None: "null", True: "true", False: "false"}.get(value) if _plain(value) else None
    return beginning(text or repr(value), 80)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _listed(values: Sequence[Any]) -> str:
    names = [shown(value) for value in values]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
