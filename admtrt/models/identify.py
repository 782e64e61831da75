"""Identify an opened checkpoint: its settings, its kind, and their source.

The file's own settings take precedence over given ones, and those over settings inferred from tensors. All
are compared with the name and shape of every tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from admtrt.brief import listed
from admtrt.config import UNetConfig
from admtrt.errors import CheckpointError, ConfigError
from admtrt.models.infer import traits_of
from admtrt.models.layouts import partial_prefix
from admtrt.models.matching import check_tensors, config_of_tensors, one_of
from admtrt.models.option_names import OptionNames
from admtrt.models.settings import check_names, with_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from admtrt.models.settings import CheckpointConfig
    from admtrt.models.stored import StoredCheckpoint
    from admtrt.presets import Kind

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_OPTIONS = OptionNames()
_ADVICE = "Give the configuration that this network was trained with."


@dataclass(frozen=True)
class IdentifiedCheckpoint:
    """A checkpoint whose settings are known; its weights are not read yet.

    Attributes:
        stored: the file.
        config: settings that fit its tensors.
        source: origin of the settings: ``file``, ``given``, or ``tensors`` (inferred, with the help of a
            matching published model).
        note: note for the user on how it was read and what was assumed; may be empty.
    """

    stored: StoredCheckpoint
    config: CheckpointConfig
    source: Literal["file", "given", "tensors"]
    note: str = ""

    @property
    def kind(self) -> Kind:
        """The kind of the network."""
        return self.config.kind


def identify_checkpoint(
    stored: StoredCheckpoint,
    *,
    kinds: Sequence[Kind],
    configs: Sequence[CheckpointConfig] = (),
    settings: Mapping[str, Any] = _NOTHING,
    shared: Mapping[str, Any] = _NOTHING,
    options: OptionNames = _OPTIONS,
) -> IdentifiedCheckpoint:
    """Identify an opened checkpoint, with or without settings of its own.

    Args:
        stored: the file, see :func:`~admtrt.models.checkpoint.open_checkpoint`.
        kinds: the accepted kinds.
        configs: configurations for a file without one, at most one per kind. The one of the file's kind is
            used, else the first. It may not contradict the file's own configuration.
        settings: single settings that override ``configs`` or, without any, supply what shapes do not
            determine.
        shared: settings of the network that it belongs to, used if its shapes allow them.
        options: names of the command-line options for this file, for hints.

    Raises:
        CheckpointError: if the file is of another kind, its tensors do not fit its configuration, or no
            configuration can be found.
        ConfigError: for an unknown name or an impossible value in ``settings``.
    """
    config = _of_its_kind(stored, configs, settings)
    if stored.embedded is not None:
        _check_kind(f"{stored.path} holds", stored.embedded.kind, kinds)
    if config is not None:
        _check_kind("the configuration given describes", config.kind, kinds)
        config = with_settings(config, settings)
    if stored.embedded is not None:
        found = _said_by_file(stored, stored.embedded, config, settings, options)
    elif config is not None:
        found = IdentifiedCheckpoint(stored, config, "given", _layout_in_words(stored))
    else:
        return _told_by_tensors(stored, kinds, settings, shared, options)  # compares them with the tensors
    _check_fits(found, kinds, options)
    return found


def _of_its_kind(
    stored: StoredCheckpoint, configs: Sequence[CheckpointConfig], settings: Mapping[str, Any]
) -> CheckpointConfig | None:
    """The configuration of the file's kind, else the first; None if none was given."""
    if len(configs) < 2:
        return configs[0] if configs else None
    kind = _kind_of(stored, settings)
    return next((config for config in configs if config.kind == kind), configs[0])


def _kind_of(stored: StoredCheckpoint, settings: Mapping[str, Any]) -> Kind | None:
    """The kind of network stored in the file, else inferred from shapes; None if unknown."""
    if stored.embedded is not None:
        return stored.embedded.kind
    try:
        return traits_of(stored.shapes, settings).kind
    except CheckpointError:  # raised later, if more than the kind is needed
        return None


def _check_kind(holder: str, kind: Kind, kinds: Sequence[Kind]) -> None:
    if kind not in kinds:
        raise CheckpointError(f"{holder} a network of kind '{kind}'; expected {one_of(kinds)}")


# --- a file that says what it is --------------------------------------------------------------------------


def _said_by_file(
    stored: StoredCheckpoint,
    embedded: CheckpointConfig,
    given: CheckpointConfig | None,
    settings: Mapping[str, Any],
    options: OptionNames,
) -> IdentifiedCheckpoint:
    """A file's own settings, with a given null class. Other given settings may not contradict them."""
    path = stored.path
    check_names(embedded.kind, settings)
    others = {key: value for key, value in settings.items() if key != "null_class"}
    _check_agreement(path, embedded, given or _changed(path, embedded, others, options), options)
    null = given.unet.null_class if given is not None and given.unet is not None else None
    config = _with_null_class(path, embedded, settings.get("null_class", null))
    return IdentifiedCheckpoint(stored, config, "file", stored.note)


def _changed(
    path: Path, embedded: CheckpointConfig, settings: Mapping[str, Any], options: OptionNames
) -> CheckpointConfig:
    """A file's settings with some replaced; raises if the combination is impossible."""
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
        f"{path} carries its own configuration, which the one given contradicts: "
        + listed(different, separator="; "),
        hint=f"Leave out {options.prefix}preset, {options.prefix}set and {options.config} for this file.",
    )


def _with_null_class(path: Path, embedded: CheckpointConfig, null: Any) -> CheckpointConfig:
    """A file's settings with the given null class."""
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


# --- a file that does not ---------------------------------------------------------------------------------


def _told_by_tensors(
    stored: StoredCheckpoint,
    kinds: Sequence[Kind],
    settings: Mapping[str, Any],
    shared: Mapping[str, Any],
    options: OptionNames,
) -> IdentifiedCheckpoint:
    """The settings inferred from names and shapes of the tensors, completed by ``settings``."""
    path = stored.path
    kind = _kind_of(stored, settings)
    if kind is not None:
        _check_kind(f"{path} holds", kind, kinds)
    try:
        config, note = config_of_tensors(
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
    _check_kind(f"{path} holds", config.kind, kinds)
    said = ". ".join(filter(None, [_layout_in_words(stored), note]))
    return IdentifiedCheckpoint(stored, config, "tensors", said)


def _check_fits(found: IdentifiedCheckpoint, kinds: Sequence[Kind], options: OptionNames) -> None:
    """Compare a configuration with the tensors.

    Raises:
        CheckpointError: naming what differs.
    """
    stored, network = found.stored, found.config.network
    if network.num_blocks > len(stored.shapes):  # before building a network of any depth for the comparison
        raise CheckpointError(
            f"the tensors of {stored.path} are not those of its configuration: it has {len(stored.shapes)} "
            f"tensors, too few for {len(network.channel_mult)} levels of {network.num_res_blocks} residual "
            "blocks",
            hint=_ADVICE,
        )
    check_tensors(
        stored.shapes,
        found.config,
        f"the tensors of {stored.path} are not those of its configuration",
        kinds=kinds,
        options=options,
        advice=_ADVICE,
    )
    if stored.convolved and not network.new_attention_order:
        raise CheckpointError(
            f"attention in {stored.path} is made of convolutions of images, whose heads have the new order; "
            "new_attention_order is False in its configuration",
            hint=f"Set {options.prefix}set new_attention_order=true, or correct it in {options.config}.",
        )


def _layout_in_words(stored: StoredCheckpoint) -> str:
    prefix = f"'{stored.prefix}' before every name was left off" if stored.prefix else ""
    attention = "attention is stored as convolutions of images: new_attention_order True"
    return "; ".join(filter(None, [prefix, attention if stored.convolved else ""]))
