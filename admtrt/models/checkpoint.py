"""Checkpoints: weights as safetensors with their configuration inside, and the published ``.pt`` files.

Reading never runs code from a file. Every error in a file becomes a :class:`CheckpointError`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from admtrt.errors import CheckpointError, OutputError
from admtrt.models.identify import IdentifiedCheckpoint, identify_checkpoint
from admtrt.models.option_names import OptionNames
from admtrt.models.readers import READERS
from admtrt.models.readers.opened import Opened
from admtrt.models.settings import CheckpointConfig as CheckpointConfig
from admtrt.models.settings import build_network as build_network
from admtrt.models.settings import checkpoint_config_from_preset as checkpoint_config_from_preset
from admtrt.models.settings import shapes_of_network
from admtrt.models.stored import METADATA_KEY as METADATA_KEY
from admtrt.models.stored import PREFIX_KEY as PREFIX_KEY
from admtrt.models.stored import StoredCheckpoint as StoredCheckpoint
from admtrt.models.stored import read_checkpoint_config as read_checkpoint_config
from admtrt.models.weights import SUFFIXES, check_weights, write_pickle, write_safetensors
from admtrt.presets import Kind as Kind

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from admtrt.models.classifier import Classifier
    from admtrt.models.unet import UNet

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_OPTIONS = OptionNames()


@dataclass(frozen=True)
class LoadedNetwork:
    """A network ready for use: float32 on the CPU, in evaluation mode, without gradients of its weights."""

    module: UNet | Classifier
    config: CheckpointConfig


def save_checkpoint(
    path: Path,
    state: Mapping[str, Tensor],
    config: CheckpointConfig,
    *,
    prefix: str = "",
    replace: bool = True,
) -> None:
    """Write a state dict and its configuration as safetensors, atomically.

    Args:
        path: the file.
        state: tensors by bare name.
        config: configuration to store in the file.
        prefix: prefix of the names when the file is converted back.
        replace: whether to replace an existing file.

    Raises:
        OutputError: if the path cannot be written, or exists and may not be replaced.
    """
    metadata = {METADATA_KEY: json.dumps(config.to_dict())} | ({PREFIX_KEY: prefix} if prefix else {})
    write_safetensors(path, state, metadata, replace=replace)


def open_checkpoint(
    path: Path, weights: str | None = None, *, options: OptionNames = _OPTIONS
) -> StoredCheckpoint:
    """Open a checkpoint without reading weights.

    Args:
        path: a ``.safetensors`` file, a ``.pt`` or ``.pth`` file with a state dict, or diffusers' folder.
        weights: which weights to use of a file with several: the name of a state dict in it, or the prefix of
            tensor names.
        options: names of the command-line options for this file, for hints.

    Raises:
        CheckpointError: if the file is missing or damaged, is not a state dict, would run code, holds several
            networks, or lacks the requested weights; for a folder that is not diffusers', or whose network or
            process ADM does not have.
    """
    opened = Opened(path, weights, options)
    return next(reader for reader in READERS if reader.recognises(opened)).read(opened)


def load_identified(found: IdentifiedCheckpoint) -> LoadedNetwork:
    """Read the weights of an identified checkpoint into its network.

    Weights stored in float32 stay memory-mapped; others are converted one by one.

    Raises:
        CheckpointError: if a weight is not dense, real and finite.
    """
    stored = found.stored
    with torch.device("meta"):
        module = build_network(found.config)
    check_weights(stored.path, stored.by_stored_name)
    weights = {key: stored.in_network(key).float() for key in stored.tensors}
    module.load_state_dict(weights, assign=True)
    return LoadedNetwork(module=module.eval().requires_grad_(False), config=found.config)


def load_network(
    path: Path,
    *,
    kind: Kind,
    config: CheckpointConfig | None = None,
    settings: Mapping[str, Any] = _NOTHING,
) -> LoadedNetwork:
    """Load a network of the expected kind; the arguments and errors are those of the functions above."""
    options = OptionNames("--classifier-" if kind == "classifier" else "--unet-")
    found = identify_checkpoint(
        open_checkpoint(path),
        kinds=(kind,),
        configs=() if config is None else (config,),
        settings=settings,
        options=options,
    )
    return load_identified(found)


def convert_checkpoint(
    stored: StoredCheckpoint, target: Path, config: CheckpointConfig | None, *, overwrite: bool = False
) -> None:
    """Write an opened file in the other layout, with the same keys, dtypes and bytes of every tensor.

    Args:
        stored: the file.
        target: the file; ``.safetensors`` includes the configuration, ``.pt`` and ``.pth`` are in the
            original's layout.
        config: the identified configuration; a ``.safetensors`` target needs it.
        overwrite: replace an existing file.

    Raises:
        CheckpointError: if a weight is not dense, real and finite.
        OutputError: if the target exists, has another suffix or cannot be written.
    """
    check_target(target, overwrite=overwrite)
    if stored.made_from is not None and target.suffix.lower() != ".safetensors":
        raise OutputError(
            f"{stored.path} is in {stored.made_from}' layout; the original's has no place for its settings",
            hint=f"Convert it to {target.with_suffix('.safetensors')}.",
        )
    check_weights(stored.path, stored.by_stored_name)
    if target.suffix.lower() == ".safetensors":
        assert config is not None
        save_checkpoint(target, stored.tensors, config, prefix=stored.prefix, replace=overwrite)
        return
    # Safetensors files are sorted; the original has the network's order.
    keys = stored.shapes if config is None else shapes_of_network(config)
    write_pickle(target, {stored.prefix + key: stored.tensors[key] for key in keys}, replace=overwrite)


def rounded(stored: StoredCheckpoint, dtype: torch.dtype) -> StoredCheckpoint:
    """Round the tensors of an opened file to a floating-point type, in memory.

    Raises:
        CheckpointError: if a weight is too large for the type.
    """
    check_weights(stored.path, stored.tensors)
    tensors = {key: tensor.to(dtype) for key, tensor in stored.tensors.items()}
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{stored.path}: {key} has weights too large for {str(dtype).removeprefix('torch.')}",
                hint="Use bf16, which reaches as far as fp32, or keep the type.",
            )
    return replace(stored, tensors=tensors)


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse an unusable target for a checkpoint before any work.

    Raises:
        OutputError: if it has an unknown suffix or exists.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"{path} has the suffix '{path.suffix}'; expected .safetensors, .pt or .pth")
    if path.is_dir() or (path.exists() and not overwrite):
        hint = "" if path.is_dir() else "Choose another place, or pass --overwrite to replace it."
        raise OutputError(f"{path} {'is a directory' if path.is_dir() else 'already exists'}", hint=hint)
