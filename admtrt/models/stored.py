"""A checkpoint opened by a reader: its tensors by ADM's names, and its own settings."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from admtrt.errors import CheckpointError, ConfigError
from admtrt.models.settings import CheckpointConfig
from admtrt.models.weights import read_metadata
from admtrt.reading import parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from admtrt.models.infer import Shapes

METADATA_KEY = "admtrt"
"""Key of a :class:`CheckpointConfig` as JSON in a safetensors header."""

PREFIX_KEY = "admtrt.key_prefix"
"""Key in that header of the prefix that all names had in the file that was converted."""

_FORMAT_VERSION = 1


@dataclass(frozen=True)
class StoredCheckpoint:
    """An opened file or folder; its tensors are memory-mapped.

    Attributes:
        path: the file or folder.
        tensors: by ADM's bare name, as stored.
        prefix: the prefix removed from every name.
        embedded: the file's own settings, if complete.
        convolved: attention's weights that are stored as 2-D 1x1 convolutions, [.., .., 1, 1].
        told: settings implied by the layout; other values may not be given.
        asks: settings that must be given although they have defaults.
        made_from: the system of its layout, if it is not the original code's.
        names: the tensors' names in the file, where they differ.
        note: note for the user on how it was read.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    prefix: str
    embedded: CheckpointConfig | None
    convolved: frozenset[str] = frozenset()
    told: Mapping[str, Any] = field(default_factory=dict)
    asks: tuple[str, ...] = ()
    made_from: Literal["diffusers"] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @functools.cached_property
    def shapes(self) -> Shapes:
        """The shape of every tensor in the network."""
        return {key: tuple(self.in_network(key).shape) for key in self.tensors}

    @property
    def by_stored_name(self) -> Mapping[str, Tensor]:
        """The tensors by their names in the file, for messages."""
        return {self.names.get(key, key): tensor for key, tensor in self.tensors.items()}

    def in_network(self, key: str) -> Tensor:
        """A tensor in the network's shape."""
        tensor = self.tensors[key]
        return tensor[..., 0] if key in self.convolved else tensor


def read_checkpoint_config(path: Path) -> CheckpointConfig | None:
    """The configuration in a file's header; None if there is none.

    Raises:
        CheckpointError: if the file is missing or damaged, or has an unusable configuration.
    """
    text = read_metadata(path).get(METADATA_KEY)
    if text is None:
        return None
    try:
        data = parse_json(text)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: the configuration in its header is no JSON object")
    version = data.get("format_version")
    if version != _FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version!r}; this version of admtrt reads {_FORMAT_VERSION}",
            hint="Update admtrt, or write the checkpoint again with this version.",
        )
    try:
        return CheckpointConfig.from_dict(data, source=f"{path} (its header)")
    except ConfigError as error:
        raise CheckpointError(error.message) from None
