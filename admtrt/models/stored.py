"""A checkpoint that a reader opened: its tensors by ADM's names, and what it says of itself."""

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
"""Name of the JSON of a :class:`CheckpointConfig` in a safetensors header."""

PREFIX_KEY = "admtrt.key_prefix"
"""Name there of the text that stood before every key in the file that it was converted from."""

_FORMAT_VERSION = 1


@dataclass(frozen=True)
class StoredCheckpoint:
    """An opened file or folder: its tensors are mapped, their bytes not yet read.

    Attributes:
        path: the file or folder.
        tensors: by ADM's bare name, as they are stored.
        prefix: what stood before every name.
        embedded: what the file says of itself, if it says all of it.
        convolved: attention's weights that are stored as 1x1 convolutions of images, [.., .., 1, 1].
        told: settings that the layout tells beside the shapes; others may not be given.
        asks: settings that must be given although they have defaults.
        made_from: the system in whose layout it is, where it is none of the original code's.
        names: what tensors are called in the file, where it is not their name here.
        note: what people are told of how it was read.
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
        """The tensors by what they are called in the file, for messages."""
        return {self.names.get(key, key): tensor for key, tensor in self.tensors.items()}

    def in_network(self, key: str) -> Tensor:
        """A tensor as the network has it."""
        tensor = self.tensors[key]
        return tensor[..., 0] if key in self.convolved else tensor


def read_checkpoint_config(path: Path) -> CheckpointConfig | None:
    """The configuration in a file's header; None if there is none.

    Raises:
        CheckpointError: if the file is missing or damaged, or says something that cannot be used.
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
