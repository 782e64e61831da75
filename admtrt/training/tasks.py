"""The objective of each task, and the settings that do not fit a task or its process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from admtrt.config import EdmConfig
from admtrt.errors import ConfigError
from admtrt.models.diffusion import Diffusion
from admtrt.schedule.process import process_from_config
from admtrt.training.consistency import ConsistencyObjective
from admtrt.training.objectives import (
    ClassifierObjective,
    DenoisingObjective,
    EdmObjective,
    Objective,
)
from admtrt.training.timesteps import make_sampler

if TYPE_CHECKING:
    import torch

    from admtrt.run_config import RunConfig, Task, TrainingConfig

_OF_EDM = ("weighting", "sigma_mean", "sigma_std")


def settle_losses(config: RunConfig) -> RunConfig:
    """Set the loss ``simple`` if none is set and the variance is fixed."""
    if config.diffusion.learns_sigma:
        return config
    sections = {"train_unet": config.train_unet, "train_upsampler": config.train_upsampler}
    return config.model_copy(
        update={
            name: settings.model_copy(update={"loss": "simple"})
            for name, settings in sections.items()
            if "loss" not in settings.model_fields_set
        }
    )


def make_objective(task: Task, config: RunConfig, device: torch.device) -> Objective:
    """Make the objective of a network, after :func:`settle_losses`.

    Raises:
        CheckpointError: if a teacher cannot be used.
        ConfigError: for a setting that does not fit this task or process.
    """
    settings: TrainingConfig = getattr(config, f"train_{task}")
    process = config.diffusion
    if task == "consistency":
        return _consistency_objective(config, device)
    if task == "classifier":
        return _classifier_objective(config)
    network = config.unet if task == "unet" else config.upsampler
    assert network is not None  # checked earlier
    takes: dict[str, Any] = {
        "class_conditional": network.num_classes is not None,
        "low_res_size": network.low_res_size,
    }
    if isinstance(process, EdmConfig):
        if settings.loss != "simple":
            raise ConfigError(
                f"train_{task}.loss is '{settings.loss}', but a process of kind 'edm' has the loss 'simple'",
                hint="Leave it out; weighting says how it is weighted.",
            )
        _refuse(
            task, settings, ("timestep_sampler", "snr_weighting"), "is nothing of a process of kind 'edm'"
        )
        if settings.weighting == "inverse-step":
            raise ConfigError(
                f"train_{task}.weighting is 'inverse-step', which belongs to consistency models",
                hint="Leave it out, or choose another.",
            )
        if process.boundary:
            raise ConfigError(
                "diffusion.boundary is true, which holds a network to the identity as consistency models are",
                hint="Set it to false, or train with: admtrt train consistency CONFIG.toml --out FOLDER",
            )
        return EdmObjective(process, settings, **takes)
    _refuse(task, settings, _OF_EDM, "belongs to processes of kind 'edm'")
    loss, variance = settings.loss, process.variance_type
    if loss == "simple" and process.learns_sigma:
        raise ConfigError(
            f"train_{task}.loss is 'simple', which teaches the network nothing about the variance, but "
            f"diffusion.variance_type is '{variance}'",
            hint="Use the loss 'hybrid', or a variance that is not learned: 'fixed_small' or 'fixed_large' "
            f"with {task}.learn_sigma = false.",
        )
    if loss == "hybrid" and not process.learns_sigma:
        raise ConfigError(
            f"train_{task}.loss is 'hybrid', whose second part teaches the variance, but "
            f"diffusion.variance_type is '{variance}'",
            hint="Use the loss 'simple', or learn the variance: 'learned_range' with "
            f"{task}.learn_sigma = true.",
        )
    if settings.snr_weighting != "none" and (loss in ("vlb", "kl") or process.mean_type == "previous_x"):
        raise ConfigError(
            f"train_{task}.snr_weighting is '{settings.snr_weighting}', which weights the squared error of "
            f"eps or x_0, but the loss is '{loss}' and diffusion.mean_type '{process.mean_type}'",
            hint="Leave it out.",
        )
    diffusion = Diffusion(process, process_from_config(process))
    levels = make_sampler(settings.timestep_sampler, len(diffusion))
    return DenoisingObjective(diffusion, loss, levels=levels, snr_weighting=settings.snr_weighting, **takes)


def _refuse(task: Task, settings: TrainingConfig, names: tuple[str, ...], why: str) -> None:
    """Refuse settings that would be ignored."""
    for name in names:
        value, usual = getattr(settings, name), type(settings).model_fields[name].default
        if value != usual:
            raise ConfigError(f"train_{task}.{name} is {value!r}, which {why}", hint="Leave it out.")


def _consistency_objective(config: RunConfig, device: torch.device) -> Objective:
    if not isinstance(config.diffusion, EdmConfig):
        raise ConfigError(
            "consistency models are trained on a process of kind 'edm', and diffusion.kind is 'discrete'",
            hint='Set in [diffusion]: kind = "edm", boundary = true',
        )
    names = ("loss", "timestep_sampler", "sigma_mean", "sigma_std", "snr_weighting")
    _refuse("consistency", config.train_consistency, names, "is nothing of a consistency model")
    return ConsistencyObjective(config, device)


def _classifier_objective(config: RunConfig) -> Objective:
    settings = config.train_classifier
    if isinstance(config.diffusion, EdmConfig):
        raise ConfigError(
            "a process of kind 'edm' takes no noisy classifier", hint="Train one on a discrete process."
        )
    if settings.sample_every:
        raise ConfigError(
            f"train_classifier.sample_every is {settings.sample_every}, but a classifier draws no images",
            hint="Set it to 0, or leave it out.",
        )
    if settings.timestep_sampler == "loss_second_moment":
        raise ConfigError(
            f"train_classifier.timestep_sampler is '{settings.timestep_sampler}', but a classifier "
            "is trained on every timestep alike",
            hint="Set it to 'uniform' or 'stratified', or leave it out.",
        )
    if settings.loss != type(settings).model_fields["loss"].default:
        raise ConfigError(
            f"train_classifier.loss is '{settings.loss}', but a classifier is trained on cross-entropy",
            hint="Leave it out.",
        )
    _refuse("classifier", settings, _OF_EDM, "belongs to processes of kind 'edm'")
    _refuse("classifier", settings, ("snr_weighting",), "weights the loss of a UNet")
    diffusion = Diffusion(config.diffusion, process_from_config(config.diffusion))
    return ClassifierObjective(diffusion, make_sampler(settings.timestep_sampler, len(diffusion)))
