"""Commands that fail by the user's fault: what they say, and that nothing else changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from admtrt.cli import run

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What a command that fails by the user's fault says."""
    assert run([str(argument) for argument in arguments]) == 2
    shown, complaint = capsys.readouterr()
    assert shown == ""
    assert "Traceback" not in complaint
    assert complaint.strip()
    return complaint


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, to be compared with those of later."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
