"""What each network is trained to do, as per-sample values of one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch.nn.functional import cross_entropy, interpolate

from admtrt.errors import ConfigError
from admtrt.training.losses import training_loss

if TYPE_CHECKING:
    from torch import Tensor, nn

    from admtrt.config import RunConfig
    from admtrt.models.diffusion import Diffusion
    from admtrt.presets import Kind


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


def make_objective(kind: Kind, config: RunConfig, diffusion: Diffusion) -> Objective:
    """The objective of a network under a configuration.

    Raises:
        ConfigError: for a setting that this kind of network cannot have.
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
        return ClassifierObjective(diffusion)
    network = config.unet if kind == "unet" else config.upsampler
    assert network is not None  # refused before
    return DenoisingObjective(
        diffusion,
        (config.train_unet if kind == "unet" else config.train_upsampler).loss,
        class_conditional=network.num_classes is not None,
        low_res_size=network.low_res_size,
    )
