"""The other side of every comparison: the checkpoints in PyTorch and the papers' formulas."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import nn

from admtrt.models.classifier import Classifier, log_prob, log_prob_gradient
from admtrt.models.diffusion import Diffusion
from admtrt.models.solvers import sample_step
from admtrt.models.unet import UNet
from admtrt.schedule.process import process_from_config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from admtrt.models.checkpoint import LoadedNetwork
    from admtrt.runtime.slots import Array, Conditions, Images, Labels
    from admtrt.schedule.sampler import SamplerConfig

_Module = TypeVar("_Module", bound=nn.Module)

_CERTAIN = 0.9


class Reference:
    """The checkpoints as functions on arrays; the process is the UNet checkpoint's, not the bundle's.

    Args:
        unet, classifier: the loaded networks, float32.
        dtype: to compute in, and of what is returned. Float64 works on a copy of the networks and tells how
            far float32's rounding takes PyTorch itself.
    """

    def __init__(
        self, unet: LoadedNetwork, classifier: LoadedNetwork | None, dtype: torch.dtype = torch.float32
    ) -> None:
        assert isinstance(unet.module, UNet)
        assert classifier is None or isinstance(classifier.module, Classifier)
        self._unet = _in_type(unet.module, dtype)
        self._classifier = None if classifier is None else _in_type(classifier.module, dtype)
        self._dtype = dtype
        self.diffusion = unet.config.diffusion

    @torch.no_grad()
    def unet(self, x: Images, t: NDArray[np.float32], conditions: Mapping[str, Array]) -> Images:
        """The UNet's output, [N, C or 2C, H, W]."""
        given = {name: self._given(values) for name, values in conditions.items()}
        out: Images = self._unet(self._given(x), self._given(t), **given).numpy()
        return out

    def classifier_gradient(self, x: Images, t: NDArray[np.float32], y: Labels) -> Images:
        """d log p(y | x_t) / dx_t by autograd, [N, C, H, W]."""
        assert self._classifier is not None
        inputs = (self._given(array) for array in (x, t, y))
        gradient: Images = log_prob_gradient(self._classifier, *inputs).numpy()
        return gradient

    @torch.no_grad()
    def log_prob(self, x: Images, t: NDArray[np.float32], y: Labels) -> NDArray[np.float32]:
        """log p(y | x_t), [N]."""
        assert self._classifier is not None
        inputs = (self._given(array) for array in (x, t, y))
        value: NDArray[np.float32] = log_prob(self._classifier, *inputs).numpy()
        return value

    def uncertain_labels(self, x: Images, t: NDArray[np.float32], y: Labels, classes: int) -> Labels:
        """``y`` with every label replaced by the next class where the classifier is all but certain of it.

        Near p = 1 both log p and its gradient hang on 1 - p, which float32 does not hold: there a comparison
        would measure rounding. A sample can be certain of one class only.
        """
        certain = np.exp(self.log_prob(x, t, y)) > _CERTAIN
        replaced: Labels = np.where(certain, (y + 1) % classes, y)
        return replaced

    def diffusion_for(self, sampler: SamplerConfig) -> Diffusion:
        """The checkpoint's process, respaced for a sampler."""
        return Diffusion(self.diffusion, process_from_config(self.diffusion, sampler.steps), self._dtype)

    @torch.no_grad()
    def update(
        self,
        sampler: SamplerConfig,
        x: Images,
        out: Images,
        grad: Images | None,
        noise: Images,
        steps: Sequence[int],
    ) -> tuple[Images, Images]:
        """x_{t-1} and the predicted x_0 by Algorithm 1 or 2, each sample at its own step of the process."""
        x_prev, x_0 = sample_step(
            self.diffusion_for(sampler),
            self._given(out),
            self._given(x),
            torch.tensor(steps),
            self._given(noise),
            None if grad is None else self._given(grad),
            sampler,
        )
        return x_prev.numpy(), x_0.numpy()

    def step(
        self, sampler: SamplerConfig, x: Images, noise: Images, step: int, conditions: Conditions
    ) -> Images:
        """x_{t-1} after one whole step of a batch, networks included."""
        steps = [step] * len(x)
        t: NDArray[np.float32] = self.diffusion_for(sampler).model_t(torch.tensor(steps)).numpy()
        out = self.unet(x, t, conditions["unet"])
        guide = conditions.get("classifier_gradient")
        grad = None if guide is None else self.classifier_gradient(x, t, **guide)
        return self.update(sampler, x, out, grad, noise, steps)[0]

    def _given(self, array: Array) -> Tensor:
        """Floating-point values in the type of the computation; labels stay whole numbers."""
        tensor = torch.from_numpy(array)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


def _in_type(module: _Module, dtype: torch.dtype) -> _Module:
    return module if dtype is torch.float32 else copy.deepcopy(module).to(dtype)
