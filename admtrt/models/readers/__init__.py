"""Readers of checkpoints, one file per layout.

Each says whether it ``recognises`` a file or folder, and can ``read`` it as a
:class:`~admtrt.models.stored.StoredCheckpoint`, whose tensors have ADM's names. To add one, write its file
and put it before readers that would accept the same files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from admtrt.models.readers import consistency, diffusers_folder, original

if TYPE_CHECKING:
    from admtrt.models.readers.opened import Opened
    from admtrt.models.stored import StoredCheckpoint


class Reader(Protocol):
    """A reader of one layout of checkpoints."""

    def recognises(self, opened: Opened, /) -> bool:
        """True for a file or folder of this layout."""
        ...

    def read(self, opened: Opened, /) -> StoredCheckpoint:
        """Open the checkpoint.

        Raises:
            CheckpointError: if it cannot be used. No code in it is executed.
        """
        ...


READERS: tuple[Reader, ...] = (diffusers_folder, consistency, original)
"""Every reader; the first that recognises a checkpoint reads it."""
