"""Files in the layout of the original code, to which all other readers convert."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from admtrt.models.readers.opened import Opened
    from admtrt.models.stored import StoredCheckpoint


def recognises(opened: Opened) -> bool:  # noqa: ARG001 - unknown files are refused later, by their tensors
    """True for any file."""
    return True


def read(opened: Opened) -> StoredCheckpoint:
    """Read the file. Its settings come from its header, its shapes or the user."""
    return opened.stored()
