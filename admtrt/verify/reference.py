"""The reference of every comparison: the checkpoints in PyTorch and the papers' formulas."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import nn

from admtrt.config import DiffusionConfig
from admtrt.contract import CLASSIFIER_GRADIENT
from admtrt.models.classifier import Classifier, log_prob, log_prob_gradient
from admtrt.models.denoiser import TorchDenoiser
from admtrt.models.diffusion import Diffusion
from admtrt.models.solvers import sample_step, trajectory
from admtrt.models.unet import UNet
from admtrt.schedule.process import process_from_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from admtrt.models.checkpoint import LoadedNetwork
    from admtrt.runtime.sampler import Denoiser
    from admtrt.runtime.slots import Array, Conditions, Images, Labels
    from admtrt.schedule.sampler import SamplerConfig

_Module = TypeVar("_Module", bound=nn.Module)

_CERTAIN = 0.9


class Reference:
    """The checkpoints as functions on arrays; the process is the UNet checkpoint's, not the bundle's.

    Args:
        unet, classifier: the loaded networks, float32.
        dtype: dtype of the networks. Float64 uses copies of the networks, and shows the effect of float32
            rounding in PyTorch itself.
    """

    def __init__(
        self, unet: LoadedNetwork, classifier: LoadedNetwork | None, dtype: torch.dtype = torch.float32
    ) -> None:
        assert isinstance(unet.module, UNet)
        assert classifier is None or isinstance(classifier.module, Classifier)
        self._unet = in_type(unet.module, dtype)
        self._classifier = None if classifier is None else in_type(classifier.module, dtype)
        self._dtype = dtype
        self.diffusion = unet.config.diffusion
        self.quantile = unet.config.threshold_quantile

    @property
    def denoiser(self) -> Denoiser:
        """The networks as the runtime's denoiser."""
        return TorchDenoiser(self._unet, self._classifier, quantile=self.quantile)

    @torch.no_grad()
    def unet(self, x: Images, t: NDArray[np.float32], conditions: Mapping[str, Array]) -> Images:
        """The UNet's output, [N, C or 2C, H, W]."""
        given = {name: self._given(values) for name, values in conditions.items()}
        out: Images = self._unet(self._given(x), self._given(t), **given).numpy()
        return out

    def unet_vector_jacobian(
        self, x: Images, t: NDArray[np.float32], cotangent: Images, conditions: Mapping[str, Array]
    ) -> Images:
        """d sum(out * cotangent) / dx by autograd, [N, C, H, W]."""
        given = {name: self._given(values) for name, values in conditions.items()}
        leaf = self._given(x).requires_grad_()
        out = self._unet(leaf, self._given(t), **given)
        (grad,) = torch.autograd.grad(out, leaf, self._given(cotangent))
        product: Images = grad.numpy()
        return product

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
        """Replace labels that the classifier is nearly certain of by the next class.

        Near p = 1, log p and its gradient depend on 1 - p, which float32 cannot represent accurately, so a
        comparison would measure rounding. A sample can be certain of one class only.
        """
        certain = np.exp(self.log_prob(x, t, y)) > _CERTAIN
        replaced: Labels = np.where(certain, (y + 1) % classes, y)
        return replaced

    def update(
        self,
        sampler: SamplerConfig,
        x: Images,
        out: Images,
        grad: Images,
        noise: Images,
        steps: Sequence[int],
    ) -> tuple[Images, Images]:
        """x_{t-1} and the predicted x_0 of a solver without memory, each sample at its own step."""
        assert isinstance(self.diffusion, DiffusionConfig)  # only these have single steps
        given = (torch.from_numpy(array).double() for array in (out, x, noise, grad))
        out_, x_, noise_, grad_ = given
        diffusion = Diffusion(
            self.diffusion, process_from_config(self.diffusion, sampler.steps), torch.float64
        )
        results = sample_step(diffusion, out_, x_, torch.tensor(steps), noise_, grad_, sampler)
        x_prev, x_0 = (result.float().numpy() for result in results)
        return x_prev, x_0

    def trajectory(
        self,
        sampler: SamplerConfig,
        x_T: Images,
        noise: Callable[[int], Images],
        conditions: Conditions,
        *,
        start: int | None = None,
        image: Images | None = None,
    ) -> Iterator[Images]:
        """The networks' inputs by the solver's paper form, then the image; float64.

        Arguments as of :func:`admtrt.models.solvers.trajectory`.
        """
        guide = conditions.get(CLASSIFIER_GRADIENT)

        def networks(x: Tensor, t: float) -> tuple[Tensor, Tensor | None]:
            given, times = x.numpy(), np.full(len(x), t, np.float32)
            out = torch.from_numpy(self.unet(given, times, conditions["unet"])).double()
            if guide is None:
                return out, None
            return out, torch.from_numpy(self.classifier_gradient(given, times, **guide)).double()

        states = trajectory(
            self.diffusion,
            sampler,
            networks,
            torch.from_numpy(x_T).double(),
            lambda left: torch.from_numpy(noise(left)).double(),
            start=start,
            image=None if image is None else torch.from_numpy(image).double(),
            quantile=self.quantile,
        )
        return (state.x.numpy() for state in states)

    def _given(self, array: Array) -> Tensor:
        """Convert floating-point values to the dtype of the computation; labels stay integers."""
        tensor = torch.from_numpy(array)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


def in_type(module: _Module, dtype: torch.dtype) -> _Module:
    """The module itself for float32, else a converted copy."""
    return module if dtype is torch.float32 else copy.deepcopy(module).to(dtype)
