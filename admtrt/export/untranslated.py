"""Functions that PyTorch's ONNX exporter does not translate, in terms of functions that it does.

Each has the values of PyTorch's own function, and its gradient, at ties too.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable

    Written = Callable[..., Any]

_WRITTEN: dict[Callable[..., Any], Written] = {}


class Translated(TorchFunctionMode):
    """Calls of the functions below become calls of their substitutes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The result of the substitute, or of the function itself."""
        result = _WRITTEN[func](*args, **kwargs or {}) if func in _WRITTEN else NotImplemented
        return func(*args, **kwargs or {}) if result is NotImplemented else result


def _for(*functions: Callable[..., Any]) -> Callable[[Written], Written]:
    """Register a substitute; it returns NotImplemented for calls that it leaves to PyTorch."""

    def register(written: Written) -> Written:
        _WRITTEN.update(dict.fromkeys(functions, written))
        return written

    return register


@_for(F.scaled_dot_product_attention)
def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any
) -> Any:
    """Any number of leading axes as one, and an axis of heads; the exporter knows four axes alone."""
    if q.dim() == 4 or q.dim() < 3 or not q.dim() == k.dim() == v.dim():
        return NotImplemented
    lead = q.shape[:-2]
    if attn_mask is not None and attn_mask.dim() > 2:
        attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-2:]).flatten(0, -3)[:, None]
    q, k, v = (part.expand(*lead, *part.shape[-2:]).flatten(0, -3)[:, None] for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, *rest, **more)
    return out.reshape(*lead, *out.shape[-2:])


@_for(torch.cdist)
def _distances(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Any:  # noqa: ARG001
    return torch.linalg.vector_norm(x1[..., :, None, :] - x2[..., None, :, :], p, dim=-1)


@_for(torch.hypot, Tensor.hypot)
def _hypotenuse(x: Tensor, other: Tensor) -> Any:
    return (x.square() + other.square()).sqrt()


@_for(torch.cumprod, Tensor.cumprod)
def _products(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    """Products of 1, 2, 4, ... neighbours, each from two of the step before."""
    x = x if dtype is None else x.to(dtype)
    size, step = x.shape[dim], 1
    while step < size:
        products = x.narrow(dim, step, size - step) * x.narrow(dim, 0, size - step)
        x = torch.cat([x.narrow(dim, 0, step), products], dim)
        step *= 2
    return x


@_for(torch.kthvalue, Tensor.kthvalue)
def _kth_value(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    ordered = (part.narrow(dim, k - 1, 1) for part in x.sort(dim))
    values, indices = (part if keepdim else part.squeeze(dim) for part in ordered)
    return torch.return_types.kthvalue((values, indices))


@_for(torch.median, Tensor.median)
def _median(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    """The lower of two middle values, as PyTorch takes it."""
    if dim is None:
        return NotImplemented
    values, indices = _kth_value(x, (x.shape[dim] + 1) // 2, dim, keepdim)
    return torch.return_types.median((values, indices))


@_for(torch.searchsorted)
def _places(
    sorted_sequence: Tensor, input: Any, *, out_int32: bool = False, right: bool = False,  # noqa: A002
    side: str | None = None, sorter: Tensor | None = None,
) -> Any:  # fmt: skip
    """The number of values that are smaller (on the right: not larger)."""
    if sorter is not None or not isinstance(input, Tensor):
        return NotImplemented
    values = sorted_sequence[..., None, :]
    below = values <= input[..., None] if right or side == "right" else values < input[..., None]
    return below.sum(-1, dtype=torch.int32 if out_int32 else torch.int64)


def _adaptive_maxima(rank: int, x: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Maxima of windows of unequal sizes, along the last axis first: the first of equals counts."""
    asked = output_size if isinstance(output_size, tuple | list) else (output_size,) * rank
    sizes = [size if to is None else to for size, to in zip(x.shape[-rank:], asked, strict=True)]
    if return_indices or all(size % to == 0 for size, to in zip(x.shape[-rank:], sizes, strict=True)):
        return NotImplemented
    for axis in range(-1, -rank - 1, -1):
        size, to = x.shape[axis], sizes[axis]
        starts = [place * size // to for place in range(to)]
        ends = [-(-(place + 1) * size // to) for place in range(to)]
        windows = [x.narrow(axis, start, end - start) for start, end in zip(starts, ends, strict=True)]
        x = torch.stack([window.max(axis).values for window in windows], axis)
    return x


_for(F.adaptive_max_pool1d)(partial(_adaptive_maxima, 1))
_for(F.adaptive_max_pool2d)(partial(_adaptive_maxima, 2))


@_for(F.rrelu)
def _leaky(
    x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Any:
    return NotImplemented if training else F.leaky_relu(x, (lower + upper) / 2, inplace)


@_for(torch.logdet, Tensor.logdet)
def _log_determinant(x: Tensor) -> Any:
    return torch.linalg.det(x).log()
