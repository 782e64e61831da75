"""Settings of a checkpoint: its network, its process and its recommended sampler."""

from __future__ import annotations

import contextlib
import difflib
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from admtrt.config import ClassifierConfig, DiffusionConfig, EdmConfig, ProcessConfig, UNetConfig
from admtrt.config_base import Config, later
from admtrt.config_errors import nearest_name
from admtrt.errors import ConfigError
from admtrt.models.classifier import Classifier
from admtrt.models.unet import UNet
from admtrt.presets import PRESETS, Kind, network_kind
from admtrt.run_config import FittedSampler, RunConfig
from admtrt.schedule.sampler import SamplerConfig

if TYPE_CHECKING:
    from collections.abc import Mapping


PROCESS_FIELDS = tuple(dict.fromkeys([*DiffusionConfig.model_fields, *EdmConfig.model_fields]))
"""Settings of processes of any kind. Networks use none of these names."""


class CheckpointConfig(Config):
    """Settings of a checkpoint.

    ``unet`` is set for the kinds ``unet`` and ``upsampler``, ``classifier`` for ``classifier``. ``sampler``
    is the recommended sampler, ``threshold_quantile`` the quantile of its dynamic thresholds if not the
    default. ``run``, ``step`` and ``ema_rate`` describe how the weights were trained.
    """

    format_version: Literal[1] = 1
    kind: Kind
    unet: UNetConfig | None = None
    classifier: ClassifierConfig | None = None
    diffusion: ProcessConfig
    sampler: FittedSampler = SamplerConfig()
    class_names: tuple[str, ...] = ()
    run: RunConfig | None = None
    step: int = 0
    ema_rate: float | None = None
    threshold_quantile: Annotated[float, Field(gt=0.0, lt=1.0)] | None = later(None)

    @property
    def network(self) -> UNetConfig | ClassifierConfig:
        """The configuration of the network that the file holds."""
        network = self.classifier or self.unet
        assert network is not None  # guaranteed by the validator
        return network

    @property
    def classes(self) -> int | None:
        """Number of classes that can be requested."""
        network = self.network
        return network.classes if isinstance(network, UNetConfig) else network.num_classes

    @property
    def facts(self) -> dict[str, Any]:
        """The settings that options may not contradict, normalised so that equal effects compare equal."""
        facts = self.network.model_dump(mode="json") | self.diffusion.model_dump(mode="json")
        facts.pop("null_class", None)  # given by options, not by files
        facts["attention_resolutions"] = sorted(self.network.attention_resolutions)
        if "rescale_timesteps" in facts:
            facts["rescale_timesteps"] = self.diffusion.time_factor != 1
        if facts["num_head_channels"] is not None:
            facts |= {"num_heads": None, "num_heads_upsample": None}
        elif facts.get("num_heads_upsample", 0) is None:
            facts["num_heads_upsample"] = facts["num_heads"]
        return facts

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        needed, other = ("classifier", "unet") if self.kind == "classifier" else ("unet", "classifier")
        if getattr(self, needed) is None or getattr(self, other) is not None:
            raise ValueError(f"kind '{self.kind}' needs the section '{needed}' and no section '{other}'")
        if network_kind(self.network) != self.kind:
            raise ValueError(
                f"kind is '{self.kind}' but unet.low_res_size makes it '{network_kind(self.network)}'"
            )
        named, classes = len(self.class_names), self.classes
        if named and classes is not None and named != classes:
            raise ValueError(f"class_names has {named} names, and the network has {classes} classes")
        if self.unet is not None:
            self.diffusion.check_variance(self.unet)
        return self


def build_network(config: CheckpointConfig) -> UNet | Classifier:
    """The network of a checkpoint with freshly initialised weights."""
    network = config.network
    return Classifier(network) if isinstance(network, ClassifierConfig) else UNet(network)


def shapes_of_network(config: CheckpointConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a network with this configuration, without building it in memory."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in build_network(config).state_dict().items()}


def checkpoint_config_from_preset(name: str) -> CheckpointConfig:
    """Settings of a published checkpoint.

    Raises:
        ConfigError: for an unknown name, with the nearest known one.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.3)
        raise ConfigError(
            f"there is no preset '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""),
            hint=f"The presets are {', '.join(PRESETS)}.",
        )
    preset = PRESETS[name]
    return CheckpointConfig.model_validate(
        {
            "kind": preset.kind,
            _section(preset.kind): preset.network,
            "diffusion": preset.diffusion,
            "sampler": preset.sampler,
        }
    )


def checkpoint_config_from_settings(
    kind: Kind, settings: Mapping[str, Any], **fields: Any
) -> CheckpointConfig:
    """Make settings from one flat table with keys of the network and of the process.

    Args:
        kind: the kind of network.
        settings: keys of its network configuration and of its :data:`~admtrt.config.ProcessConfig`.
        fields: further fields of the result.

    Raises:
        ConfigError: for an unknown key, naming the nearest, or an impossible value.
    """
    check_names(kind, settings)
    network = {key: value for key, value in settings.items() if key not in PROCESS_FIELDS}
    diffusion = {key: value for key, value in settings.items() if key in PROCESS_FIELDS}
    return CheckpointConfig.from_dict(
        fields | {"kind": kind, _section(kind): network, "diffusion": diffusion}, source="settings"
    )


def with_settings(config: CheckpointConfig, settings: Mapping[str, Any]) -> CheckpointConfig:
    """A configuration with some keys of its network or process replaced.

    Raises:
        ConfigError: as :func:`checkpoint_config_from_settings`.
    """
    if not settings:
        return config
    data = config.to_dict()
    kept = data[_section(config.kind)]
    if settings.get("kind", config.diffusion.kind) == config.diffusion.kind:
        kept |= config.diffusion.model_dump()
    if "num_heads" in settings:  # num_head_channels would override it
        kept["num_head_channels"] = None
    rest = {key: data[key] for key in data if key not in ("kind", "unet", "classifier", "diffusion")}
    rest["sampler"] = config.sampler  # keeps which of its fields were set
    return checkpoint_config_from_settings(config.kind, kept | dict(settings), **rest)


def check_names(kind: Kind, settings: Mapping[str, Any]) -> None:
    """Refuse keys that belong to neither the network nor the process.

    Raises:
        ConfigError: naming the nearest known key.
    """
    network = ClassifierConfig if kind == "classifier" else UNetConfig
    known = [*network.model_fields, *PROCESS_FIELDS]
    for key in settings:
        if key not in known:
            near = nearest_name(key, known)
            raise ConfigError(
                f"a network of kind '{kind}' has no setting '{key}'"
                + (f"; did you mean '{near}'?" if near else ""),
                hint=f"The settings are {', '.join(known)}.",
            )


def parsed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as configurations read them (``"1,2"`` is (1.0, 2.0)); what these refuse stays as it is."""
    fields = ClassifierConfig.model_fields | UNetConfig.model_fields | DiffusionConfig.model_fields
    values = dict(settings)
    for key in fields.keys() & values.keys():
        with contextlib.suppress(ValidationError):
            values[key] = TypeAdapter(fields[key].rebuild_annotation()).validate_python(values[key])
    return values


def _section(kind: Kind) -> str:
    return "classifier" if kind == "classifier" else "unet"
