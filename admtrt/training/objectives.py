"""Training objectives of each network, with per-sample values of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn.functional import cross_entropy, interpolate

from admtrt.models.edm import add_noise, denoise
from admtrt.training.losses import flat_mean, snr_weights, training_loss
from admtrt.training.timesteps import LevelSampler, LogNormalSampler, UniformSampler

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from admtrt.config import EdmConfig
    from admtrt.models.diffusion import Diffusion
    from admtrt.run_config import SnrWeighting, TrainingConfig


class Objective:
    """A training objective and the noise levels that it draws.

    Attributes:
        levels: draws the noise levels of a batch.
    """

    levels: LevelSampler

    def __call__(
        self, network: nn.Module, x_0: Tensor, y: Tensor | None, levels: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """The values of a batch, each [N]; the first, ``loss``, is minimised.

        Args:
            network: the network in training.
            x_0: images [N, C, H, W].
            y: labels, if there are any.
            levels: [N], drawn by :attr:`levels`.
            noise: standard normal, like ``x_0``.
        """
        raise NotImplementedError

    def begin(self, network: nn.Module) -> None:
        """Prepare a freshly initialised network for its first step."""

    def stepped(self, network: nn.Module, step: int, *, changed: bool) -> None:
        """Called after each step, with the new ``step`` and whether the network has changed."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-ready values for :meth:`load`."""
        return {}, {}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave."""


class DenoisingObjective(Objective):
    """The loss of a UNet or an upsampler: ``loss`` and, depending on the kind, ``mse`` and ``vb``."""

    def __init__(
        self,
        diffusion: Diffusion,
        loss: str,
        *,
        class_conditional: bool,
        low_res_size: int | None,
        levels: LevelSampler | None = None,
        snr_weighting: SnrWeighting = "none",
    ) -> None:
        self._weights = (
            None
            if snr_weighting == "none"
            else snr_weights(snr_weighting, diffusion.process, diffusion.config.mean_type)
        )
        self.levels = UniformSampler(len(diffusion)) if levels is None else levels
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
            self.diffusion,
            lambda x, t: network(x, t, labels, low_res),
            x_0,
            step,
            noise,
            kind=self.loss,
            mse_weight=None if self._weights is None else self.diffusion.at(self._weights, step).flatten(),
        )
        parts = {"loss": loss.total, "mse": loss.mse, "vb": loss.bound}
        return {name: value for name, value in parts.items() if value is not None}


class EdmObjective(Objective):
    """The loss of a UNet or an upsampler on an ``edm`` process: ``loss``, and ``mse`` of x_0.

    Args:
        process: the network's process.
        settings: the training settings.
        class_conditional, low_res_size: further inputs of the network.
    """

    def __init__(
        self,
        process: EdmConfig,
        settings: TrainingConfig,
        *,
        class_conditional: bool,
        low_res_size: int | None,
    ) -> None:
        self.levels = LogNormalSampler(settings.sigma_mean, settings.sigma_std)
        self._process = process
        self._weighting = settings.weighting
        self._class_conditional = class_conditional
        self._low_res_size = low_res_size

    def __call__(
        self, network: nn.Module, x_0: Tensor, y: Tensor | None, levels: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Evaluate on images x_0 [N, C, H, W] at the noise levels float32 [N]."""
        labels = y if self._class_conditional else None
        low_res = None if self._low_res_size is None else shrink(x_0, self._low_res_size)
        x = add_noise(x_0, levels, noise)
        predicted = denoise(self._process, lambda x, t: network(x, t, labels, low_res), x, levels)
        mse = flat_mean((predicted - x_0).square())
        return {"loss": mse * edm_weights(self._weighting, levels, self._process.sigma_data), "mse": mse}


def edm_weights(weighting: str, sigma: Tensor, sigma_data: float) -> Tensor:
    """Weights [N] of squared errors of x_0 at noise levels S, as openai/consistency_models names them."""
    snr = sigma**-2
    return {
        "karras": lambda: snr + sigma_data**-2,  # (S^2 + d^2) / (S d)^2
        "snr": lambda: snr,
        "snr+1": lambda: snr + 1,
        "truncated-snr": lambda: snr.clamp(min=1),
        "uniform": lambda: snr.new_ones(snr.shape),
    }[weighting]()


class ClassifierObjective(Objective):
    """Cross-entropy and accuracy of a classifier on noisy images."""

    def __init__(self, diffusion: Diffusion, levels: LevelSampler | None = None) -> None:
        self.levels = UniformSampler(len(diffusion)) if levels is None else levels
        self.diffusion = diffusion

    def __call__(
        self, network: nn.Module, x_0: Tensor, y: Tensor | None, step: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Evaluate on images x_0 [N, C, H, W] noised to the steps int64 [N]."""
        assert y is not None  # classifiers need labelled data, checked earlier
        logits = network(self.diffusion.q_sample(x_0, step, noise), self.diffusion.model_t(step))
        return {
            "loss": cross_entropy(logits, y, reduction="none"),
            "accuracy": (logits.argmax(dim=1) == y).float(),
        }


def shrink(x: Tensor, size: int) -> Tensor:
    """Downsample [N, C, H, W] by averaging to [N, C, size, size], an upsampler's conditioning."""
    return interpolate(x, (size, size), mode="area")
