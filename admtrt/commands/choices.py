"""What ``--backend auto`` chose: said at once, and kept for the JSON document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from admtrt.console import Output
    from admtrt.runtime.backends.auto import Choice


class Choices:
    """Called with each choice.

    Attributes:
        taken: the choices so far; none unless ``auto`` was asked for.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self.taken: list[Choice] = []

    def __call__(self, choice: Choice) -> None:
        """Say it and keep it."""
        self.taken.append(choice)
        self._output.note(str(choice))

    def to_list(self) -> list[dict[str, Any]]:
        """JSON-ready data."""
        return [choice.to_dict() for choice in self.taken]
