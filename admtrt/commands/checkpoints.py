"""Shared options: checkpoints with their settings, and the recommended sampler."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from admtrt.config import ClassifierConfig, DiffusionConfig, ProcessConfig, UNetConfig
from admtrt.config_base import Config
from admtrt.config_files import load_config, value_from_text
from admtrt.errors import CheckpointError, ConfigError, RequestError
from admtrt.models.option_names import OptionNames
from admtrt.run_config import FittedSampler, RunConfig, with_sizes_of_data
from admtrt.schedule.recommended import recommended_choices
from admtrt.schedule.sampler import SamplerConfig, with_choices
from admtrt.schedule.solvers.registry import AUTO
from admtrt.schedule.table import sampling_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from admtrt.models.checkpoint import CheckpointConfig, Kind, LoadedNetwork
    from admtrt.models.identify import IdentifiedCheckpoint
    from admtrt.models.stored import StoredCheckpoint


_NO_FACTS = frozenset({"sampler", "class_names"})
"""Settings that cannot contradict a file: its recommendation and its class names."""


class CheckpointSettings(Config):
    """The file given by ``--config``: settings of checkpoints that carry none.

    It may be the training file, whose other sections are ignored.
    """

    unet: UNetConfig | None = None
    upsampler: UNetConfig | None = None
    classifier: ClassifierConfig | None = None
    diffusion: ProcessConfig = DiffusionConfig()
    sampler: FittedSampler = SamplerConfig()
    class_names: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _leave_training_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        filled = with_sizes_of_data(data)
        others = RunConfig.model_fields.keys() - cls.model_fields.keys()
        return {key: filled[key] for key in filled if key not in others}


@dataclass(frozen=True)
class Description:
    """The command line's options for one checkpoint.

    Attributes:
        preset: name of a published model.
        config: TOML file with :class:`CheckpointSettings`.
        settings: single settings, each as ``key=value``.
        options: the names of the options that gave these values.
    """

    preset: str | None = None
    config: Path | None = None
    settings: Sequence[str] = ()
    options: OptionNames = field(default_factory=OptionNames)

    def __bool__(self) -> bool:
        return self.preset is not None or self.config is not None or bool(self.settings)


def load_pair(
    unet: Path,
    classifier: Path | None,
    *,
    unet_preset: str | None,
    classifier_preset: str | None,
    config: Path | None,
    unet_set: Sequence[str] = (),
    classifier_set: Sequence[str] = (),
    unet_weights: str | None = None,
    classifier_weights: str | None = None,
    null_class: int | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[LoadedNetwork, LoadedNetwork | None]:
    """Load a generator (UNet or upsampler) and, if given, its classifier.

    Both are identified and compared before any weights are read.

    Args:
        unet: the generator's file.
        classifier: the classifier's file.
        unet_preset: name of the published model that the generator is.
        classifier_preset: the same for the classifier.
        config: TOML file with :class:`CheckpointSettings`.
        unet_set: settings of the generator that cannot be inferred from shapes, each as ``key=value``.
        classifier_set: the same for the classifier.
        unet_weights: which weights to use of a generator's file with several sets.
        classifier_weights: the same for the classifier.
        null_class: the UNet's null class; the same as the setting ``null_class``.
        note: called with what was assumed about a file.

    Raises:
        UserError: if a checkpoint cannot be used. No code in a checkpoint is ever executed.
    """
    from admtrt.models.checkpoint import load_identified, open_checkpoint
    from admtrt.models.pair import check_pair

    if classifier is None and (classifier_preset is not None or classifier_set or classifier_weights):
        raise RequestError(
            "--classifier-preset, --classifier-set and --classifier-weights describe a classifier, "
            "and none was given",
            hint="Give its file with --classifier, or leave them out.",
        )
    if config is not None and unet_preset and (classifier is None or classifier_preset):
        raise RequestError(
            f"{config} says nothing that is asked for: the presets say what the checkpoints are",
            hint="Leave --config out, or the presets of what it describes.",
        )
    if null_class is not None:
        unet_set = [*unet_set, f"null_class={null_class}"]
    said = Description(unet_preset, config, unet_set, options=OptionNames("--unet-"))
    generator = identify_described(
        open_checkpoint(unet, unet_weights, options=said.options),
        kinds=("unet", "upsampler"),
        description=said,
        note=note,
    )
    if classifier is None:
        return load_identified(generator), None
    said = Description(classifier_preset, config, classifier_set, options=OptionNames("--classifier-"))
    noisy = identify_described(
        open_checkpoint(classifier, classifier_weights, options=said.options),
        kinds=("classifier",),
        description=said,
        note=note,
        shared={"image_size": generator.config.network.image_size},
    )
    try:
        check_pair(generator.config, noisy.config)
    except CheckpointError as error:
        raise CheckpointError(
            f"{unet} and {classifier} do not belong together: {error.message}", hint=error.hint
        ) from None
    return load_identified(generator), load_identified(noisy)


def describes_networks(config: Path) -> bool:
    """True if a TOML file has a section of a network.

    Raises:
        ConfigError: as :func:`admtrt.config_files.load_config`.
    """
    said = load_config(CheckpointSettings, config)
    return any((said.unet, said.upsampler, said.classifier))


def identify_described(
    stored: StoredCheckpoint,
    *,
    kinds: Sequence[Kind],
    description: Description,
    note: Callable[[str], None],
    shared: Mapping[str, Any] = MappingProxyType({}),
) -> IdentifiedCheckpoint:
    """Identify an opened file by its own settings, else the preset, else ``--config``, else its tensors.

    ``shared`` are settings of the network that it belongs to, used where its tensors are ambiguous.

    Raises:
        UserError: if the file cannot be identified, or the options contradict it.
    """
    from admtrt.models.checkpoint import checkpoint_config_from_preset
    from admtrt.models.identify import identify_checkpoint

    settings = parse_settings(description.settings)
    said = None if description.config is None else load_config(CheckpointSettings, description.config)
    if description.preset is not None:
        configs = [checkpoint_config_from_preset(description.preset)]
    else:
        configs = [] if said is None else _described(description, said, stored, kinds)
    found = identify_checkpoint(
        stored, kinds=kinds, configs=configs, settings=settings, shared=shared, options=description.options
    )
    if found.note:
        note(f"{stored.path}: {found.note}")
    if said is None or description.preset is not None:
        return found
    replaced = {name: getattr(said, name) for name in _NO_FACTS & said.model_fields_set}
    data = found.config.to_dict() | replaced
    return replace(found, config=type(found.config).from_dict(data, source=str(description.config)))


def parse_settings(items: Sequence[str]) -> dict[str, Any]:
    """Parse settings written ``key=value``, with the value in TOML notation or as plain text.

    Raises:
        ConfigError: for another form, or a repeated key.
    """
    settings: dict[str, Any] = {}
    for item in items:
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals or not key or key in settings:
            fault = "comes twice" if key in settings else "is not of the form key=value"
            raise ConfigError(f"setting {item!r} {fault}")
        settings[key] = value_from_text(text)
    return settings


def _described(
    description: Description, said: CheckpointSettings, stored: StoredCheckpoint, kinds: Sequence[Kind]
) -> list[CheckpointConfig]:
    """The configurations of ``--config``'s sections that describe networks of the given kinds."""
    from admtrt.models.checkpoint import CheckpointConfig

    if not any((said.unet, said.upsampler, said.classifier)):
        if stored.embedded is not None and said.model_fields_set <= _NO_FACTS:
            return []
        raise ConfigError(
            f"{description.config} has no section [unet], [upsampler] or [classifier]",
            hint=f"Describe the network there; single settings go into {description.options.prefix}set.",
        )
    shared = said.model_dump(include={"diffusion", "sampler", "class_names"})
    networks = {kind: network for kind in kinds if (network := getattr(said, kind)) is not None}
    return [
        CheckpointConfig.from_dict(
            {"kind": kind, "classifier" if kind == "classifier" else "unet": network.to_dict(), **shared},
            source=str(description.config),
        )
        for kind, network in networks.items()
    ]


def recommended_sampler(checkpoint: CheckpointConfig, choices: Mapping[str, Any]) -> SamplerConfig:
    """The sampler that a generator's checkpoint recommends, with some choices replaced.

    The method ``auto`` stands for :mod:`admtrt.schedule.recommended`, with its steps and options.

    Raises:
        ConfigError: if the result is impossible.
        RequestError: if the checkpoint's process cannot be respaced this way.
    """
    if choices.get("method") == AUTO:
        given = {name: value for name, value in choices.items() if value is not None and name != "method"}
        choices = {**recommended_choices(checkpoint.diffusion), **given}
    sampler = with_choices(checkpoint.sampler, checkpoint.diffusion, choices)
    sampling_schedule(checkpoint.diffusion, sampler)  # raises now if impossible
    return sampler
