"""Networks in PyTorch as the runtime's denoiser: what samplers, evaluation and the bench run of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from admtrt.schedule.table import UPDATE

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from admtrt.runtime.sampler import Images, Labels

_CPU = torch.device("cpu")


class TorchDenoiser:
    """Networks in PyTorch as a :class:`~admtrt.runtime.sampler.Denoiser`; float32 in and out.

    Args:
        unet: called with x, t and, where conditioned, ``y`` and ``low_res``.
        classifier: called with x and t, gives logits; None without guidance.
        device: on which they run.
        dtype: of the computation; others than float32 by autocast.
    """

    def __init__(
        self,
        unet: nn.Module,
        classifier: nn.Module | None = None,
        device: torch.device = _CPU,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._unet = unet.eval().to(device)
        self._classifier = None if classifier is None else classifier.eval().to(device)
        self._device = device
        self._dtype = dtype

    def unet(self, x: Images, t: NDArray[np.float32], y: Labels | None, low_res: Images | None) -> Images:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        return to_array(self.evaluate(*map(self.tensor, (x, t, y, low_res))))

    def classifier_gradient(self, x: Images, t: NDArray[np.float32], y: Labels) -> Images:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        return to_array(self.gradient(*map(self.tensor, (x, t, y))))

    def update(
        self, x: Images, out: Images, grad: Images, noise: Images, coefficients: NDArray[np.float32]
    ) -> tuple[Images, Images]:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        x_prev, x_0 = update(*map(self.tensor, (x, out, grad, noise, coefficients)))
        return to_array(x_prev), to_array(x_0)

    @torch.no_grad()
    def evaluate(self, x: Tensor, t: Tensor, y: Tensor | None, low_res: Tensor | None) -> Tensor:
        """The UNet's output as float32 on the device."""
        given = {name: value for name, value in (("y", y), ("low_res", low_res)) if value is not None}
        with self._cast():
            out: Tensor = self._unet(x, t, **given)
        # A compiled network's output lies where the next compiled network's graph may write.
        return out.float().clone()

    @torch.enable_grad()
    def gradient(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """d log p(y | x_t) / dx_t by autograd, on the device."""
        assert self._classifier is not None
        x = x.detach().requires_grad_()
        with self._cast():
            logits = self._classifier(x, t)
        log_prob = torch.log_softmax(logits.float(), dim=-1).gather(1, y[:, None])
        return torch.autograd.grad(log_prob.sum(), x)[0].clone()

    def tensor(self, array: Any) -> Any:
        """An array on the device; None stays None. A CUDA device copies while the host goes on."""
        if array is None:
            return None
        tensor = torch.from_numpy(array)
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _cast(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)


def update(
    x: Tensor, out: Tensor, grad: Tensor, noise: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """x_{t-1} and the predicted x_0, as :func:`admtrt.schedule.step_coefficients` documents."""
    c = {name: coefficients[:, i, None, None, None] for i, name in enumerate(UPDATE)}
    value, *learned = torch.split(out, x.shape[1], dim=1)
    x_0 = torch.clamp(c["x0_from_x"] * x + c["x0_from_out"] * value, -c["clip"], c["clip"])
    log_weight = c["log_weight"] + (c["log_weight_from_v"] * learned[0] if learned else 0)
    x_prev = c["prev_from_x0"] * x_0 + c["prev_from_x"] * x + c["prev_from_out"] * value
    x_prev = x_prev + c["guidance"] * log_weight.exp() * grad + c["noise"] * (log_weight / 2).exp() * noise
    return x_prev, x_0 + c["x0_shift"] * grad


def to_array(tensor: Tensor) -> Images:
    """A tensor of any device as an array."""
    made: Images = tensor.cpu().numpy()
    return made
