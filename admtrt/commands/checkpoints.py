"""Options that several commands share: checkpoints with their settings, and the recommended sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from admtrt.config import (
    ClassifierConfig,
    Config,
    DiffusionConfig,
    SamplerConfig,
    UNetConfig,
    load_config,
    method_for_steps,
)
from admtrt.schedule import retained_timesteps

if TYPE_CHECKING:
    from pathlib import Path

    from admtrt.models.checkpoint import CheckpointConfig, Kind, LoadedNetwork


class CheckpointSettings(Config):
    """The file given by ``--config``: what checkpoints that carry no settings are."""

    unet: UNetConfig | None = None
    upsampler: UNetConfig | None = None
    classifier: ClassifierConfig | None = None
    diffusion: DiffusionConfig = DiffusionConfig()
    sampler: SamplerConfig = SamplerConfig()
    class_names: tuple[str, ...] = ()


def load_pair(
    unet: Path,
    classifier: Path | None,
    *,
    unet_preset: str | None,
    classifier_preset: str | None,
    config: Path | None,
) -> tuple[LoadedNetwork, LoadedNetwork | None]:
    """Load a generator (UNet or upsampler) and, where given, its classifier.

    Raises:
        UserError: if a checkpoint cannot be used; nothing of it has been executed.
    """
    from admtrt.models.checkpoint import load_network

    settings = None if config is None else load_config(CheckpointSettings, config)
    given = _settings(("unet", "upsampler"), unet_preset, settings)
    generator = load_network(unet, kind=_generator_kind(unet, given), config=given)
    if classifier is None:
        return generator, None
    given = _settings(("classifier",), classifier_preset, settings)
    return generator, load_network(classifier, kind="classifier", config=given)


def _settings(
    kinds: tuple[Kind, ...], preset: str | None, settings: CheckpointSettings | None
) -> CheckpointConfig | None:
    from admtrt.models.checkpoint import CheckpointConfig, checkpoint_config_from_preset

    if preset is not None:
        return checkpoint_config_from_preset(preset)
    for kind in kinds:
        network = None if settings is None else getattr(settings, kind)
        if settings is not None and network is not None:
            field = "classifier" if kind == "classifier" else "unet"
            shared = settings.model_dump(include={"diffusion", "sampler", "class_names"})
            return CheckpointConfig.from_dict({"kind": kind, field: network.to_dict(), **shared})
    return None


def _generator_kind(path: Path, given: CheckpointConfig | None) -> Kind:
    """Whether the first checkpoint is a UNet or an upsampler: what it says of itself, else what was given."""
    from admtrt.models.checkpoint import read_checkpoint_config

    config = read_checkpoint_config(path) or given
    return "upsampler" if config is not None and config.kind == "upsampler" else "unet"


def recommended_sampler(
    checkpoint: CheckpointConfig, *, method: str | None, steps: str | None, scale: float | None
) -> SamplerConfig:
    """The sampler that a generator's checkpoint recommends, with some choices replaced.

    Raises:
        ConfigError: if the result is impossible.
        RequestError: if the checkpoint's process cannot be respaced so.
    """
    chosen = checkpoint.sampler.to_dict()
    if method is None and steps is not None:
        method = method_for_steps(steps)
    if method is not None and method != chosen["method"]:
        chosen |= {"method": method, "eta": 0.0}
    given = {"steps": steps, "scale": scale}
    sampler = SamplerConfig.from_dict(
        chosen | {name: value for name, value in given.items() if value is not None}, source="sampler"
    )
    retained_timesteps(checkpoint.diffusion.steps, sampler.steps)  # refuses an impossible respacing now
    return sampler
