"""What a folder holds, to be compared with what it should hold, or holds later."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def names(folder: Path) -> list[str]:
    """What lies directly in it."""
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under it."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
