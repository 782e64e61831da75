"""A path for which the reader is still to be chosen."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from admtrt.errors import CheckpointError
from admtrt.models.layouts import WeightSet, choose_weights
from admtrt.models.stored import PREFIX_KEY, StoredCheckpoint, read_checkpoint_config
from admtrt.models.weights import read_metadata, read_state_dicts

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from admtrt.models.option_names import OptionNames

_LONGEST_PREFIX = 100  # characters


@dataclass(frozen=True)
class Opened:
    """A file or folder whose content is read when a reader needs it.

    Attributes:
        path: the path.
        weights: the requested weights, if a file has several.
        options: names of the command-line options for it, for hints.
    """

    path: Path
    weights: str | None
    options: OptionNames

    @functools.cached_property
    def chosen(self) -> WeightSet:
        """The weights of one network in a file.

        Raises:
            CheckpointError: as :func:`~admtrt.models.layouts.choose_weights`.
        """
        option = f"{self.options.prefix}weights"
        return choose_weights(self.path, read_state_dicts(self.path), self.weights, option)

    def stored(self, **known: Any) -> StoredCheckpoint:
        """The file as a checkpoint, with the settings implied by its layout (see :class:`StoredCheckpoint`).

        Raises:
            CheckpointError: if its header cannot be used.
        """
        embedded = read_checkpoint_config(self.path)
        prefix = self.chosen.prefix or read_metadata(self.path).get(PREFIX_KEY, "")
        if len(prefix) > _LONGEST_PREFIX:  # added to every key when the file is converted back
            raise CheckpointError(
                f"{self.path} has a header that puts {len(prefix)} characters before every key"
            )
        return StoredCheckpoint(self.path, self.chosen.tensors, prefix, embedded, **known)
