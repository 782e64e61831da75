"""Consistency distillation and consistency training (Song et al. 2023, Algorithms 2 and 3)."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from admtrt.config import EdmConfig
from admtrt.errors import CheckpointError, ConfigError
from admtrt.files import sha256_of
from admtrt.models.checkpoint import load_network
from admtrt.models.edm import add_noise, denoise, heun_step
from admtrt.models.unet import UNet
from admtrt.training.losses import flat_mean
from admtrt.training.objectives import Objective, edm_weights
from admtrt.training.timesteps import IndexSampler, LevelSampler

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from admtrt.config import UNetConfig
    from admtrt.run_config import ConsistencyTrainingConfig, RunConfig

_HUBER = 0.00054
"""Constant of the pseudo-Huber loss relative to sqrt(C H W): Song & Dhariwal 2023, section 3.3."""


def levels_at(settings: ConsistencyTrainingConfig, step: int) -> int:
    """N(k), the number of noise levels at a step: Song et al. 2023, appendix C, as in their code."""
    first, last = settings.first_levels, settings.levels - 1
    if first is None:
        return settings.levels
    done = min(step / settings.steps, 1.0)
    return max(math.ceil(math.sqrt(done * ((last + 1) ** 2 - first**2) + first**2) - 1), 1) + 1


def target_rate(settings: ConsistencyTrainingConfig, step: int) -> float:
    """mu(k), the EMA rate of the target network at a step: from the same source."""
    first = settings.first_levels
    if first is None or settings.target_ema == 0:
        return settings.target_ema
    return math.exp(first * math.log(settings.target_ema) / (levels_at(settings, step) - 1))


class ConsistencyObjective(Objective):
    """Consistency loss: equal predictions at adjacent noise levels of a probability flow ODE trajectory.

    The prediction at the noisier level is trained towards that of the *target*, an average of the network, at
    the cleaner level. The state there comes from one Heun step of the teacher or, without a teacher, from the
    image itself.

    Args:
        config: a run with a process of the kind ``edm``.
        device: of the networks.

    Raises:
        CheckpointError: if the teacher cannot be read, or its network or process differs.
        ConfigError: for a setting that has no effect here.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        process = config.process("consistency")
        assert isinstance(process, EdmConfig)
        assert config.unet is not None
        self._process = process
        self._settings = config.train_consistency
        self._conditional = config.unet.num_classes is not None
        self._device = device
        self._step = 0
        self.target: nn.Module | None = None
        self._teacher: UNet | None = None
        self._teacher_process = process
        self._digest = ""
        self.levels: LevelSampler = IndexSampler(lambda step: levels_at(self._settings, step) - 1)
        if self._settings.teacher is not None:
            path = Path(self._settings.teacher)
            self._teacher, self._teacher_process = _load_teacher(path, config.unet, process)
            self._teacher.to(device)
            self._digest = sha256_of(path)

    def begin(self, network: nn.Module) -> None:
        """Initialise the network from the teacher, if there is one, and the target from the network."""
        if self._teacher is not None:
            network.load_state_dict(self._teacher.state_dict())
        self.target = copy.deepcopy(network).to(self._device).requires_grad_(False)

    def __call__(
        self, network: nn.Module, x_0: Tensor, y: Tensor | None, levels: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Evaluate on images x_0 [N, C, H, W] between the levels int64 [N] and the next cleaner ones."""
        assert self.target is not None
        labels = y if self._conditional else None
        sigma, to = self._sigma(levels), self._sigma(levels + 1)
        x = add_noise(x_0, sigma, noise)
        # Both use the same dropout mask.
        seed = torch.initial_seed()
        torch.manual_seed(seed)
        predicted = denoise(self._process, lambda x, t: network(x, t, labels, None), x, sigma)
        with torch.no_grad():
            next_x = self._next(x_0, x, noise, sigma, to, labels)
            target = self.target.train(network.training)
            torch.manual_seed(seed)
            wanted = denoise(self._process, lambda x, t: target(x, t, labels, None), next_x, to)
        weights = (
            1 / (sigma - to)
            if self._settings.weighting == "inverse-step"
            else edm_weights(self._settings.weighting, sigma, self._process.sigma_data)
        )
        return {"loss": self._distance(predicted, wanted) * weights}

    def _next(
        self, x_0: Tensor, x: Tensor, noise: Tensor, sigma: Tensor, to: Tensor, labels: Tensor | None
    ) -> Tensor:
        teacher = self._teacher
        if teacher is None:
            return add_noise(x_0, to, noise)
        return heun_step(self._teacher_process, lambda x, t: teacher(x, t, labels, None), x, sigma, to)

    def _sigma(self, index: Tensor) -> Tensor:
        """Noise levels of Karras et al.'s grid, the noisiest first."""
        process = self._process
        high, low = process.sigma_max ** (1 / process.rho), process.sigma_min ** (1 / process.rho)
        place = index.double() / (levels_at(self._settings, self._step) - 1)
        sigma: Tensor = (high + place * (low - high)) ** process.rho
        return sigma.float()

    def _distance(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        squared = (predicted - wanted).square()
        if self._settings.distance == "l2":
            return flat_mean(squared)
        c = self._settings.huber_c or _HUBER * math.sqrt(squared[0].numel())
        return (squared.flatten(1).sum(dim=1) + c**2).sqrt() - c

    @torch.no_grad()
    def stepped(self, network: nn.Module, step: int, *, changed: bool) -> None:
        """Move the target towards the network, if the network has changed."""
        assert self.target is not None
        if changed:
            rate = target_rate(self._settings, self._step)
            torch._foreach_lerp_(
                list(self.target.state_dict().values()), list(network.state_dict().values()), 1 - rate
            )
        self._step = step

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The target, and the identity of the teacher."""
        assert self.target is not None
        return self.target.state_dict(), {"step": self._step, "teacher": self._digest}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave.

        Raises:
            ConfigError: if the teacher's file has changed.
        """
        assert self.target is not None
        if values["teacher"] != self._digest:
            raise ConfigError(
                f"the run learned from another file than {self._settings.teacher} now is",
                hint="Put the teacher's file back, or begin anew with --overwrite.",
            )
        self.target.load_state_dict(tensors)
        self._step = values["step"]


def _load_teacher(path: Path, student: UNetConfig, process: EdmConfig) -> tuple[UNet, EdmConfig]:
    loaded = load_network(path, kind="unet")
    theirs = loaded.config.diffusion
    if not isinstance(theirs, EdmConfig):
        raise CheckpointError(
            f"the teacher {path} was trained on a process of kind '{theirs.kind}'",
            hint='Train it with admtrt train unet and [diffusion] kind = "edm".',
        )
    if theirs.boundary:
        raise CheckpointError(
            f"the teacher {path} is a consistency model; a diffusion model is needed",
            hint="Give the UNet that admtrt train unet wrote.",
        )
    assert isinstance(loaded.module, UNet)
    ours = student.model_dump() | process.model_dump(exclude={"boundary"})
    other = loaded.module.config.model_dump() | theirs.model_dump(exclude={"boundary"})
    different = [f"{key} is {other[key]} there, {ours[key]} here" for key in ours if ours[key] != other[key]]
    different = [one for one in different if not one.startswith("dropout ")]
    if different:
        raise CheckpointError(
            f"the teacher {path} is another network or of another process: {'; '.join(different)}",
            hint="The student begins with the teacher's weights: give [unet] and [diffusion] its settings.",
        )
    return loaded.module, theirs
