"""Files of openai/consistency_models and what derives from it: attention as convolutions of images.

Their heads are in the new order, and their process may be of either kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from admtrt.models.layouts import convolved_attention

if TYPE_CHECKING:
    from admtrt.models.readers.opened import Opened
    from admtrt.models.stored import StoredCheckpoint


def recognises(opened: Opened) -> bool:
    """A file whose attention is all of that layout."""
    return bool(convolved_attention(opened.chosen.tensors))


def read(opened: Opened) -> StoredCheckpoint:
    """The file; whether its process is discrete or edm must be said."""
    convolved = convolved_attention(opened.chosen.tensors)
    return opened.stored(convolved=convolved, told={"new_attention_order": True}, asks=("kind",))
