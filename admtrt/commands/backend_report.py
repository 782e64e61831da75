"""Findings of ``--backend auto``: shown at once and kept for the JSON output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from admtrt.console import Output
    from admtrt.runtime.backends.auto import Fastest


class BackendReport:
    """Called with each message and each finding.

    Attributes:
        found: the findings so far; empty unless the backend is ``auto``.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self.found: list[Fastest] = []

    def __call__(self, said: str | Fastest) -> None:
        """Show a message, and keep it if it is a finding."""
        if not isinstance(said, str):
            self.found.append(said)
        self._output.note(str(said))

    def to_list(self) -> list[dict[str, Any]]:
        """The findings as JSON values."""
        return [found.to_dict() for found in self.found]
