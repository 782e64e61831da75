"""Commands that fail with a user error, and their messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from admtrt.cli import run

if TYPE_CHECKING:
    import pytest


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The message of a command that must fail with a user error."""
    capsys.readouterr()  # drop the output of earlier commands
    assert run([str(argument) for argument in arguments]) == 2
    shown, complaint = capsys.readouterr()
    assert shown == ""
    assert "Traceback" not in complaint
    assert complaint.strip()
    return complaint
