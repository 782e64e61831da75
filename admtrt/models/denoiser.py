"""The runtime's denoiser on PyTorch networks, for sample grids, evaluation and the bench."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from admtrt.contract import quantile_of
from admtrt.schedule.edits import EDIT
from admtrt.schedule.table import UPDATE, UPDATE_FULL

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from admtrt.contract import GraphName
    from admtrt.runtime.slots import Array

_CPU = torch.device("cpu")


class TorchDenoiser:
    """Networks in PyTorch as a :class:`~admtrt.runtime.sampler.Denoiser`; float32 in and out.

    Args:
        unet: called with x, t and, if it takes them, ``y`` and ``low_res``.
        classifier: called with x and t, returns logits; None without guidance.
        device: device of the networks.
        dtype: dtype of the computation; other than float32 by autocast.
        quantile: quantile of dynamic thresholds, as for :func:`~admtrt.contract.threshold_quantile`.
    """

    def __init__(
        self,
        unet: nn.Module,
        classifier: nn.Module | None = None,
        device: torch.device = _CPU,
        dtype: torch.dtype = torch.float32,
        quantile: float | None = None,
    ) -> None:
        self._quantile = quantile
        self._unet = unet.eval().to(device)
        self._classifier = None if classifier is None else classifier.eval().to(device)
        self._device = device
        self._dtype = dtype

    def run(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        results = self.compute(graph, {name: self.tensor(values) for name, values in feeds.items()})
        return {name: to_array(values) for name, values in results.items()}

    def compute(self, graph: GraphName, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Like :meth:`run`, with tensors on the device; the results are float32."""
        if graph == "unet":
            return {"out": self._evaluate(**given)}
        if graph == "classifier_gradient":
            return self._gradient(**given)
        if graph == "threshold":
            return threshold(**given, quantile=self._quantile)
        return SMALL_GRAPHS[graph](**given)

    @torch.no_grad()
    def _evaluate(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        with self._cast():
            out: Tensor = self._unet(x, t, **conditions)
        # Copy: the next compiled network may overwrite the output buffer of this one.
        return out.float().clone()

    @torch.enable_grad()
    def _gradient(self, x: Tensor, t: Tensor, y: Tensor) -> dict[str, Tensor]:
        """d log p(y | x_t) / dx_t by autograd, and log p(y | x_t)."""
        assert self._classifier is not None
        x = x.detach().requires_grad_()
        with self._cast():
            logits = self._classifier(x, t)
        log_prob = torch.log_softmax(logits.float(), dim=-1).gather(1, y[:, None])
        grad = torch.autograd.grad(log_prob.sum(), x)[0].clone()
        return {"grad": grad, "log_prob": log_prob.detach()[:, 0]}

    def tensor(self, array: Array) -> Tensor:
        """Copy an array to the device, asynchronously for CUDA."""
        tensor = torch.from_numpy(array)
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _cast(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)


def update(x: Tensor, out: Tensor, grad: Tensor, noise: Tensor, coefficients: Tensor) -> dict[str, Tensor]:
    """The graph ``update``, as :mod:`admtrt.schedule.table` documents it."""
    c, value, log_weight = _given(UPDATE, x, out, coefficients)
    x_0 = torch.clamp(c["x0_from_x"] * x + c["x0_from_out"] * value, -c["clip"], c["clip"])
    x_prev = c["prev_from_x0"] * x_0 + c["prev_from_x"] * x + c["prev_from_out"] * value
    x_prev = x_prev + c["guidance"] * log_weight.exp() * grad + c["noise"] * (log_weight / 2).exp() * noise
    return {"x_prev": x_prev, "pred_x0": x_0 + c["x0_shift"] * grad}


def update_full(
    x: Tensor,
    out: Tensor,
    grad: Tensor,
    noise: Tensor,
    saved: Tensor,
    h1: Tensor,
    h2: Tensor,
    r: Tensor,
    coefficients: Tensor,
) -> dict[str, Tensor]:
    """The graph ``update_full``, as :mod:`admtrt.schedule.table` documents it."""
    c, value, log_weight = _given(UPDATE_FULL, x, out, coefficients)
    bound = r[:, None, None, None]
    d = torch.clamp(_unbounded(c, x, value, grad), -bound, bound) * (c["clip"] / bound)
    m = d + c["x0_shift"] * grad
    x_prev = c["prev_from_x0"] * d + c["prev_from_x"] * x + c["prev_from_out"] * value
    x_prev = x_prev + c["guidance"] * log_weight.exp() * grad + c["noise"] * (log_weight / 2).exp() * noise
    x_prev = x_prev + c["prev_from_saved"] * saved + c["prev_from_h1"] * h1 + c["prev_from_h2"] * h2
    x_prev = torch.clamp(x_prev + c["shift"] * grad, -c["state_clip"], c["state_clip"])
    kept = c["saved_from_x"] * x + c["saved_from_saved"] * saved + c["saved_from_x0"] * m
    kept = kept + c["saved_from_h1"] * h1 + c["saved_from_h2"] * h2
    return {"x_prev": x_prev, "pred_x0": m, "saved_next": kept}


def threshold(
    x: Tensor, out: Tensor, grad: Tensor, coefficients: Tensor, *, quantile: float | None = None
) -> dict[str, Tensor]:
    """The graph ``threshold``."""
    c, value, _ = _given(UPDATE_FULL, x, out, coefficients)
    size = out[0].numel() * x.shape[1] // out.shape[1]
    values = _unbounded(c, x, value, grad).abs().flatten(1)
    found = torch.quantile(values, quantile_of(size, quantile), dim=1)
    clip, bound = c["clip"].flatten(), c["bound"].flatten()
    return {"r": torch.minimum(torch.maximum(clip, found), bound)}


def edit(
    x_prev: Tensor, mask: Tensor, reference: Tensor, noise2: Tensor, coefficients: Tensor
) -> dict[str, Tensor]:
    """The graph ``edit``, as :mod:`admtrt.schedule.edits` documents it."""
    keep, x, missing = _renoised(x_prev, reference, noise2, coefficients)
    return {"x_edited": x + keep * mask * missing}


def edit_low_pass(
    x_prev: Tensor, rows: Tensor, columns: Tensor, reference: Tensor, noise2: Tensor, coefficients: Tensor
) -> dict[str, Tensor]:
    """The graph ``edit_low_pass``."""
    keep, x, missing = _renoised(x_prev, reference, noise2, coefficients)
    return {"x_edited": x + keep * (rows[:, None] @ missing @ columns[:, None].mT)}


SMALL_GRAPHS: Mapping[GraphName, Callable[..., dict[str, Tensor]]] = {
    "update": update,
    "update_full": update_full,
    "threshold": threshold,
    "edit": edit,
    "edit_low_pass": edit_low_pass,
}
"""The small graphs in PyTorch, by name."""


def _given(
    names: tuple[str, ...], x: Tensor, out: Tensor, coefficients: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The columns, the first C channels of the network's output, and log w."""
    c = {name: coefficients[:, i, None, None, None] for i, name in enumerate(names)}
    value, *learned = torch.split(out, x.shape[1], dim=1)
    return c, value, c["log_weight"] + (c["log_weight_from_v"] * learned[0] if learned else 0)


def _renoised(
    x_prev: Tensor, reference: Tensor, noise2: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The column ``keep``, x'' and the noised reference minus x''."""
    c = {name: coefficients[:, i, None, None, None] for i, name in enumerate(EDIT)}
    x = x_prev + c["renoise"] * noise2
    return c["keep"], x, c["reference"] * reference + c["noise"] * noise2 - x


def _unbounded(c: dict[str, Tensor], x: Tensor, value: Tensor, grad: Tensor) -> Tensor:
    return c["x0_from_x"] * x + c["x0_from_out"] * value + c["x0_from_grad"] * grad


def to_array(tensor: Tensor) -> Array:
    """Convert a tensor on any device to an array."""
    made: Array = tensor.cpu().numpy()
    return made
