"""What each network is trained to do, as per-sample values of one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch.nn.functional import cross_entropy, interpolate

from admtrt.errors import ConfigError
from admtrt.training.losses import training_loss

if TYPE_CHECKING:
    from torch import Tensor, nn

    from admtrt.models.diffusion import Diffusion
    from admtrt.presets import Kind
    from admtrt.run_config import RunConfig


class Objective(Protocol):
    """The values of a batch, each [N]; ``loss`` comes first and is what is minimised."""

    def __call__(
        self, network: nn.Module, x_0: Tensor, y: Tensor | None, step: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Evaluate on images x_0 [N, C, H, W], labels and noise at the steps int64 [N]."""
        ...


class DenoisingObjective:
    """The loss of a UNet or an upsampler: ``loss``, and ``mse`` and ``vb`` where it has them."""

    def __init__(
        self, diffusion: Diffusion, loss: str, *, class_conditional: bool, low_res_size: int | None
    ) -> None:
        self.diffusion = diffusion
        self.loss = loss
        self.class_conditional = class_conditional
        self.low_res_size = low_res_size

    def __call__(
        self, network: nn.Module, x_0: Tensor, y: Tensor | None, step: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Evaluate on images x_0 [N, C, H, W] at the steps int64 [N]."""
        labels = y if self.class_conditional else None
        low_res = None if self.low_res_size is None else shrink(x_0, self.low_res_size)
        loss = training_loss(
            self.diffusion, lambda x, t: network(x, t, labels, low_res), x_0, step, noise, kind=self.loss
        )
        parts = {"loss": loss.total, "mse": loss.mse, "vb": loss.bound}
        return {name: value for name, value in parts.items() if value is not None}


class ClassifierObjective:
    """Cross-entropy and accuracy of a classifier on noisy images."""

    def __init__(self, diffusion: Diffusion) -> None:
        self.diffusion = diffusion

    def __call__(
        self, network: nn.Module, x_0: Tensor, y: Tensor | None, step: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Evaluate on images x_0 [N, C, H, W] noised to the steps int64 [N]."""
        assert y is not None  # a classifier's data is refused without classes
        logits = network(self.diffusion.q_sample(x_0, step, noise), self.diffusion.model_t(step))
        return {
            "loss": cross_entropy(logits, y, reduction="none"),
            "accuracy": (logits.argmax(dim=1) == y).float(),
        }


def shrink(x: Tensor, size: int) -> Tensor:
    """Average [N, C, H, W] down to [N, C, size, size]: what an upsampler is conditioned on."""
    return interpolate(x, (size, size), mode="area")


def settle_losses(config: RunConfig) -> RunConfig:
    """The configuration with the loss ``simple`` where none is set and the variance is fixed."""
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


def make_objective(kind: Kind, config: RunConfig, diffusion: Diffusion) -> Objective:
    """The objective of a network under a configuration whose losses are settled.

    Raises:
        ConfigError: for a setting that this kind of network or process cannot have.
    """
    if kind == "classifier":
        settings = config.train_classifier
        if settings.sample_every:
            raise ConfigError(
                f"train_classifier.sample_every is {settings.sample_every}, but a classifier draws no images",
                hint="Set it to 0, or leave it out.",
            )
        if settings.timestep_sampler != "uniform":
            raise ConfigError(
                f"train_classifier.timestep_sampler is '{settings.timestep_sampler}', but a classifier "
                "is trained on every timestep alike",
                hint="Set it to 'uniform', or leave it out.",
            )
        if settings.loss != type(settings).model_fields["loss"].default:
            raise ConfigError(
                f"train_classifier.loss is '{settings.loss}', but a classifier is trained on cross-entropy",
                hint="Leave it out.",
            )
        return ClassifierObjective(diffusion)
    network = config.unet if kind == "unet" else config.upsampler
    assert network is not None  # refused before
    loss = (config.train_unet if kind == "unet" else config.train_upsampler).loss
    variance = config.diffusion.variance_type
    if loss == "simple" and config.diffusion.learns_sigma:
        raise ConfigError(
            f"train_{kind}.loss is 'simple', which teaches the network nothing about the variance, but "
            f"diffusion.variance_type is '{variance}'",
            hint="Use the loss 'hybrid', or a variance that is not learned: 'fixed_small' or 'fixed_large' "
            f"with {kind}.learn_sigma = false.",
        )
    if loss == "hybrid" and not config.diffusion.learns_sigma:
        raise ConfigError(
            f"train_{kind}.loss is 'hybrid', whose second part teaches the variance, but "
            f"diffusion.variance_type is '{variance}'",
            hint="Use the loss 'simple', or learn the variance: 'learned_range' with "
            f"{kind}.learn_sigma = true.",
        )
    return DenoisingObjective(
        diffusion,
        loss,
        class_conditional=network.num_classes is not None,
        low_res_size=network.low_res_size,
    )
