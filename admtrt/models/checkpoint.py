"""Checkpoints: weights as safetensors with their configuration inside, and the published ``.pt`` files.

Reading never runs code from a file, and every fault of a file becomes a :class:`CheckpointError`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from admtrt.config import UNetConfig
from admtrt.errors import CheckpointError, ConfigError, OutputError
from admtrt.models.layouts import partial_prefix
from admtrt.models.matching import Identified, check_tensors, identify_tensors, listing, shapes_of_network
from admtrt.models.option_names import OptionNames
from admtrt.models.readers import READERS
from admtrt.models.readers.opened import Opened
from admtrt.models.settings import CheckpointConfig as CheckpointConfig
from admtrt.models.settings import build_network as build_network
from admtrt.models.settings import check_names, with_settings
from admtrt.models.settings import checkpoint_config_from_preset as checkpoint_config_from_preset
from admtrt.models.stored import METADATA_KEY as METADATA_KEY
from admtrt.models.stored import PREFIX_KEY as PREFIX_KEY
from admtrt.models.stored import StoredCheckpoint as StoredCheckpoint
from admtrt.models.stored import read_checkpoint_config as read_checkpoint_config
from admtrt.models.weights import SUFFIXES, check_weights, write_pickle, write_safetensors
from admtrt.presets import Kind as Kind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from admtrt.models.classifier import Classifier
    from admtrt.models.infer import Shapes
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
    """Write a state dict and its configuration as safetensors; the old file stays until the new one is whole.

    Args:
        path: the file.
        state: tensors by bare name.
        config: what the file says of itself.
        prefix: what stands before the names where the file is converted back.
        replace: a file that stands there.

    Raises:
        OutputError: if the place cannot be written, or is taken and not to be replaced.
    """
    metadata = {METADATA_KEY: json.dumps(config.to_dict())} | ({PREFIX_KEY: prefix} if prefix else {})
    write_safetensors(path, state, metadata, replace=replace)


def open_checkpoint(
    path: Path, weights: str | None = None, *, options: OptionNames = _OPTIONS
) -> StoredCheckpoint:
    """Open a checkpoint without reading weights.

    Args:
        path: a ``.safetensors`` file, a ``.pt`` or ``.pth`` file with a state dict, or diffusers' folder.
        weights: which to take of a file that holds several: the name of a state dict in it, or what stands
            before the names of its tensors.
        options: what the command line's options for this file are called, for advice.

    Raises:
        CheckpointError: if the file is missing, damaged, no state dict or wants to run code, or holds the
            weights of several networks, or of others than were asked for; for a folder that is none of
            diffusers', or of a network or a process that ADM has not.
    """
    opened = Opened(path, weights, options)
    return next(reader for reader in READERS if reader.recognises(opened)).read(opened)


def identify(
    stored: StoredCheckpoint,
    *,
    kinds: Sequence[Kind],
    config: CheckpointConfig | None = None,
    settings: Mapping[str, Any] = _NOTHING,
    shared: Mapping[str, Any] = _NOTHING,
    options: OptionNames = _OPTIONS,
) -> Identified:
    """The configuration of an opened file, checked against the name and shape of every tensor.

    Args:
        stored: the file.
        kinds: what it may hold.
        config: for a file that carries no configuration; it may not contradict one that does.
        settings: single settings that replace those of ``config`` or, without one, answer what the shapes do
            not tell.
        shared: settings of the network that it goes with, which are its own where its shapes allow them.
        options: what the command line's options for this file are called, for advice.

    Raises:
        CheckpointError: if the file is of another kind, its tensors are not those of its configuration, or
            no configuration can be found.
        ConfigError: for an unknown name or an impossible value in ``settings``.
    """
    path, embedded = stored.path, stored.embedded
    for candidate in (embedded, config):
        if candidate is not None and candidate.kind not in kinds:
            holder = f"{path} holds" if candidate is embedded else "the configuration given describes"
            raise CheckpointError(_other_kind(holder, candidate.kind, kinds))
    given = None if config is None else with_settings(config, settings)
    if embedded is not None:
        check_names(embedded.kind, settings)
        others = {key: value for key, value in settings.items() if key != "null_class"}
        _check_agreement(path, embedded, given or _changed(path, embedded, others, options), options)
        null = given.unet.null_class if given is not None and given.unet is not None else None
        embedded = _with_null_class(path, embedded, settings.get("null_class", null))
    known = embedded or given
    if known is None:
        kind = stored.kind(settings)
        if kind is not None and kind not in kinds:
            raise CheckpointError(_other_kind(f"{path} holds", kind, kinds))
        try:
            found = identify_tensors(
                stored.shapes,
                name=path.stem,
                given=settings,
                options=options,
                told=stored.told,
                asks=stored.asks,
                shared=shared,
            )
        except CheckpointError as error:
            partial = partial_prefix(stored.tensors)
            alone = f"Take them alone with {options.prefix}weights {partial}" if partial else ""
            raise CheckpointError(f"{path}: {error.message}", hint=alone or error.hint) from None
        if found.config.kind not in kinds:
            raise CheckpointError(_other_kind(f"{path} holds", found.config.kind, kinds))
        return Identified(found.config, ". ".join(filter(None, [_layout_in_words(stored), found.note])))
    _check_depth(path, known, stored.shapes)
    check_tensors(
        stored.shapes,
        known,
        f"the tensors of {path} are not those of its configuration",
        kinds=kinds,
        options=options,
        advice="Give the configuration that this network was trained with.",
    )
    if stored.convolved and not known.network.new_attention_order:
        raise CheckpointError(
            f"attention in {path} is made of convolutions of images, whose heads have the new order; "
            "new_attention_order is False in its configuration",
            hint=f"Set {options.prefix}set new_attention_order=true, or correct it in {options.config}.",
        )
    return Identified(known, stored.note if stored.embedded else _layout_in_words(stored))


def _layout_in_words(stored: StoredCheckpoint) -> str:
    prefix = f"'{stored.prefix}' before every name was left off" if stored.prefix else ""
    attention = "attention is stored as convolutions of images: new_attention_order True"
    return "; ".join(filter(None, [prefix, attention if stored.convolved else ""]))


def load_stored(stored: StoredCheckpoint, config: CheckpointConfig) -> LoadedNetwork:
    """Read the weights of an opened file into the network of its identified configuration.

    Weights stored in float32 stay mapped; others are converted one by one.

    Raises:
        CheckpointError: if a weight is not dense, real and finite.
    """
    with torch.device("meta"):
        module = build_network(config)
    check_weights(stored.path, stored.by_stored_name)
    weights = {key: stored.in_network(key).float() for key in stored.tensors}
    module.load_state_dict(weights, assign=True)
    return LoadedNetwork(module=module.eval().requires_grad_(False), config=config)


def load_network(
    path: Path,
    *,
    kind: Kind,
    config: CheckpointConfig | None = None,
    settings: Mapping[str, Any] = _NOTHING,
) -> LoadedNetwork:
    """Load a network of the expected kind; the arguments and errors are those of the functions above."""
    stored = open_checkpoint(path)
    options = OptionNames("--classifier-" if kind == "classifier" else "--unet-")
    found = identify(stored, kinds=(kind,), config=config, settings=settings, options=options)
    return load_stored(stored, found.config)


def convert_checkpoint(
    stored: StoredCheckpoint, target: Path, config: CheckpointConfig | None, *, overwrite: bool = False
) -> None:
    """Write an opened file in the other layout with the same keys, dtypes and bytes of every tensor.

    Args:
        stored: the file.
        target: ``.safetensors`` describes itself; ``.pt`` and ``.pth`` are as the original code writes them.
        config: the identified configuration; a ``.safetensors`` target needs it.
        overwrite: replace a file that stands there.

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
    # Safetensors files are sorted; the original's order is that of the network.
    keys = stored.shapes if config is None else shapes_of_network(config)
    write_pickle(target, {stored.prefix + key: stored.tensors[key] for key in keys}, replace=overwrite)


def rounded(stored: StoredCheckpoint, dtype: torch.dtype) -> StoredCheckpoint:
    """An opened file whose tensors are rounded to a floating-point type, in memory.

    Raises:
        CheckpointError: if a weight is too large for it.
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
    """Refuse a place for a checkpoint before any work.

    Raises:
        OutputError: if it has an unknown suffix or is taken.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"{path} has the suffix '{path.suffix}'; expected .safetensors, .pt or .pth")
    if path.is_dir() or (path.exists() and not overwrite):
        hint = "" if path.is_dir() else "Choose another place, or pass --overwrite to replace it."
        raise OutputError(f"{path} {'is a directory' if path.is_dir() else 'already exists'}", hint=hint)


def _other_kind(holder: str, kind: Kind, kinds: Sequence[Kind]) -> str:
    expected = " or ".join(f"'{one}'" for one in kinds)
    return f"{holder} a network of kind '{kind}'; expected {expected}"


def _changed(
    path: Path, embedded: CheckpointConfig, settings: Mapping[str, Any], options: OptionNames
) -> CheckpointConfig:
    """A file's settings with some replaced, which may be impossible together with the others."""
    kind = settings.get("kind", embedded.diffusion.kind)
    if kind != embedded.diffusion.kind:
        raise _contradicted(path, [f"kind is {embedded.diffusion.kind} in the file, {kind} given"], options)
    try:
        return with_settings(embedded, settings)
    except ConfigError as error:
        raise CheckpointError(
            f"{path} carries its own configuration, which the settings given do not fit: {error.message}",
            hint=f"Leave out {options.prefix}set for this file.",
        ) from None


def _check_depth(path: Path, config: CheckpointConfig, shapes: Shapes) -> None:
    """Compare what costs nothing before a network of any depth is built to compare the rest."""
    network = config.network
    if network.num_blocks > len(shapes):
        raise CheckpointError(
            f"the tensors of {path} are not those of its configuration: it has {len(shapes)} tensors, "
            f"too few for {len(network.channel_mult)} levels of {network.num_res_blocks} residual blocks",
            hint="Give the configuration that this network was trained with.",
        )


def _check_agreement(
    path: Path, embedded: CheckpointConfig, given: CheckpointConfig, options: OptionNames
) -> None:
    if embedded.kind != given.kind:
        raise CheckpointError(
            f"{path} holds a network of kind '{embedded.kind}'; "
            f"the configuration given describes one of kind '{given.kind}'"
        )
    ours, theirs = embedded.facts, given.facts
    if embedded.diffusion.kind != given.diffusion.kind:
        ours, theirs = ({"kind": c.diffusion.kind} for c in (embedded, given))
    different = [
        f"{key} is {ours[key]} in the file, {theirs[key]} given" for key in ours if ours[key] != theirs[key]
    ]
    if different:
        raise _contradicted(path, different, options)


def _contradicted(path: Path, different: list[str], options: OptionNames) -> CheckpointError:
    return CheckpointError(
        f"{path} carries its own configuration, which the one given contradicts: {listing(different)}",
        hint=f"Leave out {options.prefix}preset, {options.prefix}set and {options.config} for this file.",
    )


def _with_null_class(path: Path, embedded: CheckpointConfig, null: Any) -> CheckpointConfig:
    """A file's settings, with the null class that was given beside it."""
    if embedded.unet is None or null is None:
        return embedded
    network = UNetConfig.from_dict(embedded.unet.to_dict() | {"null_class": null}, source=str(path))
    index = network.null_class
    known = embedded.unet.null_class
    if known not in (None, index):
        raise CheckpointError(
            f"{path} says that its null class is {known}; {null} was given", hint="Leave it out."
        )
    names = embedded.class_names
    if known is None and index is not None and names:
        names = names[:index] + names[index + 1 :]
    return embedded.model_copy(update={"unet": network, "class_names": names})
