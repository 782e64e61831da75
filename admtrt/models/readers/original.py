"""Files in the layout of the original code, which every other reader's tensors are brought to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from admtrt.models.readers.opened import Opened
    from admtrt.models.stored import StoredCheckpoint


def recognises(opened: Opened) -> bool:  # noqa: ARG001 - what no other reader knows is refused by its tensors
    """Any file."""
    return True


def read(opened: Opened) -> StoredCheckpoint:
    """The file, whose settings come from its header, its shapes or whoever knows them."""
    return opened.stored()
