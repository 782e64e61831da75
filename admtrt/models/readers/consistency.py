"""Files of openai/consistency_models and its derivatives: attention as 2-D convolutions.

Their heads are in the new order, and their process may be of either kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from admtrt.models.layouts import convolved_attention

if TYPE_CHECKING:
    from admtrt.models.readers.opened import Opened
    from admtrt.models.stored import StoredCheckpoint


def recognises(opened: Opened) -> bool:
    """True if all attention of a file has that layout."""
    return bool(convolved_attention(opened.chosen.tensors))


def read(opened: Opened) -> StoredCheckpoint:
    """Read the file. The user must say whether its process is discrete or edm."""
    convolved = convolved_attention(opened.chosen.tensors)
    return opened.stored(convolved=convolved, told={"new_attention_order": True}, asks=("kind",))
