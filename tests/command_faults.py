"""Commands that fail by the user's fault, and what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from admtrt.cli import run

if TYPE_CHECKING:
    import pytest


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What a command that fails by the user's fault says."""
    capsys.readouterr()  # what came before is not its own
    assert run([str(argument) for argument in arguments]) == 2
    shown, complaint = capsys.readouterr()
    assert shown == ""
    assert "Traceback" not in complaint
    assert complaint.strip()
    return complaint
