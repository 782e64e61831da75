"""Find the published model that a state dict belongs to or is derived from."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from admtrt.brief import listed
from admtrt.errors import CheckpointError
from admtrt.models.infer import UNTOLD, UntoldSettingError, infer_config, stand_in, traits_of
from admtrt.models.settings import CheckpointConfig, checkpoint_config_from_preset
from admtrt.models.settings import shapes_of_network as shapes_of_network
from admtrt.presets import PRESETS, Kind, Preset

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from admtrt.config import ClassifierConfig, UNetConfig
    from admtrt.models.infer import Shapes, Traits
    from admtrt.models.option_names import OptionNames

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_CONVOLVED = [name for name, preset in PRESETS.items() if preset.diffusion.kind == "edm"]
_ALIKE = 0.9  # fraction of equal keys from which a published model is named in a message
_CHANGED_BY_FORKS = ("num_classes", "in_channels", "image_size")
_ASSUMED = (
    "image_size",
    "low_res_size",
    "num_head_channels",
    "num_heads",
    "num_heads_upsample",
    "new_attention_order",
    "schedule",
    "steps",
    "rescale_timesteps",
    "mean_type",
    "variance_type",
)


class ConfigOfTensors(NamedTuple):
    """The configuration of tensors, and a note that lists the assumed settings, if any."""

    config: CheckpointConfig
    note: str = ""


def config_of_tensors(
    shapes: Shapes,
    *,
    name: str,
    given: Mapping[str, Any],
    options: OptionNames,
    told: Mapping[str, Any] = _NOTHING,
    asks: Collection[str] = (),
    shared: Mapping[str, Any] = _NOTHING,
) -> ConfigOfTensors:
    """The configuration of tensors in a file without one.

    Settings neither visible in the shapes nor ``given`` are assumed from the nearest published model: the
    tensors have its shapes, or differ only in classes, channels or image size. If several models are
    equally near, only settings that they have in common are assumed. Tensors that do not fit an ADM network
    with any settings are refused first, before settings are requested.

    Args:
        shapes: every tensor's shape by its bare name.
        name: the file's name without its suffix, which decides between published models of equal shapes.
        given: settings that are known.
        options: names of the command line's options for this file, for hints.
        told: settings that the file contains in another form.
        asks: as for :func:`~admtrt.models.infer.infer_config`.
        shared: settings of the network that this one is used with; they override a published model's.

    Raises:
        CheckpointError: as :func:`~admtrt.models.infer.infer_config`, or for the names or shapes of tensors.
        ConfigError: likewise.
    """
    likely = stand_in(shapes, given)
    fault = "these are not the tensors of an ADM network, whatever its settings"
    check_tensors(shapes, likely, fault, kinds=(likely.kind,), options=options)
    try:
        traits = traits_of(shapes, given, told=told)
        presets, changed = _kin(traits, name, given.get("kind", "discrete"))
        assumed = {**_common_settings(presets), **shared}
        config = infer_config(shapes, given=given, assumed=assumed, told=told, asks=asks)
    except UntoldSettingError as error:
        same = [name for name in _CONVOLVED if asks and _preset_shapes(name) == shapes]
        published = f", or with {options.prefix}preset which of {_listed(same)} it is" if same else ""
        raise CheckpointError(
            error.message,
            hint=f"Give each with {options.prefix}set KEY=VALUE{published}, or describe the network with "
            f"{options.config}.",
        ) from None
    if not presets:
        return ConfigOfTensors(
            config, "" if "rescale_residuals" in given else "assumed: rescale_residuals False"
        )
    samplers = {
        preset.sampler
        for preset in presets
        if checkpoint_config_from_preset(preset.name).facts == config.facts
    }
    if len(samplers) == 1:
        config = config.model_copy(update={"sampler": samplers.pop()})
    differences = _settings_in_words(config, changed)
    known = {*given, *traits.settings, *shared}
    in_words = _settings_in_words(config, [key for key in _ASSUMED if key not in known])
    note = f"its tensors are those of {_listed([preset.name for preset in presets])}"
    note += f" but for {differences}" if differences else ""
    note += f"; assumed from there: {in_words}" if in_words else ""
    note += "; these recommend different samplers" if len(samplers) > 1 else ""
    return ConfigOfTensors(
        config, f"{note}. Say otherwise with {options.prefix}preset or {options.prefix}set."
    )


def check_tensors(
    shapes: Shapes,
    config: CheckpointConfig,
    fault: str,
    *,
    kinds: Sequence[Kind],
    options: OptionNames,
    advice: str = "",
) -> None:
    """Refuse tensors that are not those of a configuration.

    Args:
        shapes: every tensor's shape by its bare name.
        config: configuration of the expected tensors.
        fault: the beginning of the message; names of some of the tensors follow it.
        kinds: the kinds of network that are accepted.
        options: names of the command line's options for this file, for hints.
        advice: the hint if the tensors fit no published model better.

    Raises:
        CheckpointError: its hint names the published model that the tensors fit better, if there is one.
    """
    expected = shapes_of_network(config)
    if expected != shapes:
        better = fraction_equal(shapes, expected)
        raise CheckpointError(
            "\n".join([f"{fault}:", *_differences(shapes, expected)]),
            hint=preset_hint(shapes, kinds, better_than=better, options=options) or advice,
        )


def nearest_preset(shapes: Shapes) -> tuple[str, float] | None:
    """The published model most similar to a state dict.

    Returns:
        Its name, and the fraction of all keys (of either) that both have with equal shapes. Among equally
        similar models, the first. None if no model has a key in common with the state dict.
    """
    fractions = {name: fraction_equal(shapes, _preset_shapes(name)) for name in PRESETS}
    name = max(fractions, key=fractions.__getitem__)
    return (name, fractions[name]) if fractions[name] else None


def preset_hint(shapes: Shapes, kinds: Sequence[Kind], *, better_than: float, options: OptionNames) -> str:
    """A hint that names a published model that the tensors fit better than a given fraction, or empty."""
    nearest = nearest_preset(shapes)
    if nearest is None or nearest[1] < _ALIKE or nearest[1] <= better_than:
        return ""
    name, fraction = nearest
    same = [other for other in PRESETS if _preset_shapes(other) == _preset_shapes(name)]
    if fraction < 1:
        return f"{fraction:.0%} of the keys are those of {_listed(same)}: it may be a variant of that model."
    if PRESETS[name].kind not in kinds:
        kind = PRESETS[name].kind
        return f"These are the keys of {_listed(same)}, of kind '{kind}'; expected {one_of(kinds)}."
    choice = (
        f"{options.prefix}preset {name}"
        if len(same) == 1
        else f"{options.prefix}preset with the one that it is"
    )
    return f"These are the keys of {_listed(same)}: pass {choice}."


def fraction_equal(left: Shapes, right: Shapes) -> float:
    """The fraction of all keys (of either) that both have with equal shapes."""
    return len(left.items() & right.items()) / max(len(left.keys() | right.keys()), 1)


def _preset_shapes(name: str) -> Shapes:
    return _shapes_of(_without_dropout(name))


@functools.cache
def _shapes_of(network: UNetConfig | ClassifierConfig) -> Shapes:
    name = next(name for name in PRESETS if _without_dropout(name) == network)
    return shapes_of_network(checkpoint_config_from_preset(name))


def _without_dropout(name: str) -> UNetConfig | ClassifierConfig:
    """A published network without dropout, which variants differ in and shapes do not depend on."""
    return PRESETS[name].network.model_copy(update={"dropout": 0.0})


def _kin(traits: Traits, name: str, process: str) -> tuple[list[Preset], list[str]]:
    """The published models that a network may be derived from, nearest only, and the settings it changed.

    Only models with the same kind of process are compared: neither the kind nor the boundary condition is
    ever assumed from a published model of equal shapes.
    """
    distances = {
        preset: changed
        for preset in PRESETS.values()
        if preset.diffusion.kind == process and (changed := _changes(traits, preset)) is not None
    }
    fewest = min((len(changed) for changed in distances.values()), default=0)
    nearest = [preset for preset, changed in distances.items() if len(changed) == fewest]
    nearest = [preset for preset in nearest if preset.name == name] or nearest
    return nearest, distances[nearest[0]] if nearest else []


def _changes(traits: Traits, preset: Preset) -> list[str] | None:
    """The settings, inferred from shapes, that differ from a published model's; None for an unrelated one."""
    network = preset.network
    attends = tuple(size in network.attention_resolutions for size in network.level_sizes)
    if (traits.kind, traits.attends) != (preset.kind, attends):
        return None
    changed = [key for key, value in traits.settings.items() if value != getattr(network, key)]
    if traits.side not in (None, network.level_sizes[-1]):
        changed.append("image_size")
    return changed if set(changed) <= set(_CHANGED_BY_FORKS) else None


def _common_settings(presets: Sequence[Preset]) -> dict[str, Any]:
    """The settings not visible in shapes that have the same value in all these published models."""
    tables = [preset.network.model_dump() | preset.diffusion.model_dump() for preset in presets]
    return {
        key: tables[0][key]
        for key in UNTOLD
        if tables and key in tables[0] and all(table[key] == tables[0][key] for table in tables)
    }


def _settings_in_words(config: CheckpointConfig, keys: Sequence[str]) -> str:
    values = config.network.model_dump() | config.diffusion.model_dump()
    if values["num_head_channels"] is not None:
        values |= {"num_heads": None, "num_heads_upsample": None}  # they have no effect then
    elif config.kind != "classifier":
        values["num_heads_upsample"] = values["num_heads_upsample"] or values["num_heads"]
    if config.kind == "classifier":
        values |= {"mean_type": None, "variance_type": None}  # a classifier does not use them
    if "num_classes" in keys and values["num_classes"] is None:
        values["num_classes"] = "none"
    return ", ".join(f"{key} {values[key]}" for key in keys if values.get(key) is not None)


def _listed(names: Sequence[str]) -> str:
    quoted = ", ".join(f"'{name}'" for name in names)
    return f"preset {quoted}" if len(names) == 1 else f"presets {quoted}"


def _differences(found: Shapes, expected: Shapes) -> list[str]:
    parts = {
        "missing": [f"{key} {list(expected[key])}" for key in expected if key not in found],
        "unexpected": [f"{key} {list(found[key])}" for key in found if key not in expected],
        "of another shape": [
            f"{key} is {list(found[key])}, expected {list(expected[key])}"
            for key in expected
            if found.get(key, expected[key]) != expected[key]
        ],
    }
    return [
        f"{len(names)} {fault}: {listed(names, separator='; ')}" for fault, names in parts.items() if names
    ]


def one_of(names: Iterable[str]) -> str:
    """Alternatives, quoted."""
    return " or ".join(f"'{name}'" for name in names)
