"""Check losses before export: one number per sample, which depends on that sample's image only."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from admtrt.errors import ExportError, LossError
from admtrt.export.gradient import export_input_gradient

if TYPE_CHECKING:
    from collections.abc import Mapping

    from admtrt.export.guides.guide import Guide

_BATCH = 3
_SAME = 1e-4
"""Tolerance relative to a sample's largest value: another batch may sum products in another order."""
_T = 500.0


def check_loss(guide: Guide, event: tuple[int, ...]) -> None:
    """Compare a loss and its gradient on noise: alone with in a batch, and PyTorch with the exported graph.

    Args:
        guide: the guide with the loss.
        event: (C, H, W) of the images.

    Raises:
        LossError: naming the guide and what is wrong with its loss.
    """
    module = guide.loss.eval().requires_grad_(False)
    wrt = guide.parameters[0]
    inputs = _inputs(guide, event)
    value, grad = _differentiated(guide, inputs, wrt)
    if value.shape != (_BATCH,):
        raise LossError(
            f"guide '{guide.name}': the loss of {_BATCH} samples has the shape {list(value.shape)}, expected "
            f"[{_BATCH}]: one number for each sample",
            hint="Sum over all axes but the first.",
        )
    if not (torch.isfinite(value).all() and torch.isfinite(grad).all()):
        raise LossError(
            f"guide '{guide.name}': the loss or its gradient is not finite on random images in [-2, 2] with "
            "targets in [0, 1]"
        )
    if not grad.any():
        raise LossError(f"guide '{guide.name}': the loss does not depend on {wrt}")
    alone, alone_grad = _differentiated(guide, {name: given[:1] for name, given in inputs.items()}, wrt)
    for what, one, other in (("loss", alone, value[:1]), ("gradient", alone_grad, grad[:1])):
        if one.shape != other.shape or not (one - other).abs().max() <= _SAME * other.abs().max() + 1e-12:
            raise LossError(
                f"guide '{guide.name}': the loss mixes samples: the {what} of a sample differs in a batch",
                hint="Take norms, means and sums over all axes but the first.",
            )
    if guide.through == "unet":  # verify compares the gradient through the UNet
        with tempfile.TemporaryDirectory(prefix="admtrt-loss-") as folder:
            try:
                export_input_gradient(module, inputs, Path(folder) / "loss.onnx", wrt=wrt)
            except ExportError as error:
                raise LossError(f"guide '{guide.name}': {error.message}", hint=error.hint) from None


def _inputs(guide: Guide, event: tuple[int, ...]) -> dict[str, Tensor]:
    """Random inputs in the order of ``forward``."""
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name in guide.parameters:
        if name == "t":
            inputs[name] = torch.full((_BATCH,), _T)
            continue
        image = name in ("x0", "x_t", "x")
        sizes = event if image else tuple(guide.targets.get(name, ()))
        drawn = torch.rand((_BATCH, *sizes), generator=generator)
        inputs[name] = drawn * 4 - 2 if image else drawn
    return inputs


def _differentiated(guide: Guide, inputs: Mapping[str, Tensor], wrt: str) -> tuple[Tensor, Tensor]:
    leaf = inputs[wrt].clone().requires_grad_()
    try:
        with torch.enable_grad():
            value = guide.loss(*(leaf if name == wrt else given for name, given in inputs.items()))
            if not isinstance(value, Tensor):
                raise LossError(
                    f"guide '{guide.name}': the loss is a {type(value).__name__}; expected a tensor [N]"
                )
            if not value.requires_grad:
                raise LossError(f"guide '{guide.name}': the loss does not depend on {wrt}")
            (grad,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True, materialize_grads=True)
    except ExportError:
        raise
    except Exception as error:  # user code can raise anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise LossError(
            f"guide '{guide.name}': the loss fails on {len(leaf)} random images: {reason}"
        ) from error
    return value.detach(), grad
