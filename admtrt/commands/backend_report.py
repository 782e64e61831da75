"""Findings of ``--backend auto``: said at once, and kept for the JSON document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from admtrt.console import Output
    from admtrt.runtime.backends.auto import Fastest


class BackendReport:
    """Called with each message and each finding.

    Attributes:
        found: the findings so far; none unless ``auto`` was asked for.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self.found: list[Fastest] = []

    def __call__(self, said: str | Fastest) -> None:
        """Say it, and keep it where it is a finding."""
        if not isinstance(said, str):
            self.found.append(said)
        self._output.note(str(said))

    def to_list(self) -> list[dict[str, Any]]:
        """JSON-ready data."""
        return [found.to_dict() for found in self.found]
