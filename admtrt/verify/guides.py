"""The guides of a bundle in PyTorch, differentiated by autograd."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from admtrt.contract import guide_spec, unet_spec
from admtrt.errors import CheckpointError
from admtrt.export.guides.graphs import GuidedUNet, NoisyLoss
from admtrt.export.guides.guide import Guide
from admtrt.export.guides.named import BUILT_INS
from admtrt.verify.judged import perturbed
from admtrt.verify.reference import in_type
from admtrt.verify.tolerances import AS_FAR_AS_PYTORCH

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from admtrt.bundle import Manifest
    from admtrt.config import UNetConfig
    from admtrt.export.guides.guide import AnyGuide
    from admtrt.models.checkpoint import LoadedNetwork
    from admtrt.runtime.slots import Array, Images


def guides_of(manifest: Manifest, given: Sequence[AnyGuide], unet: LoadedNetwork) -> dict[str, AnyGuide]:
    """The guides of a bundle in PyTorch: the given ones, and built-in ones without a file.

    Raises:
        CheckpointError: if one is missing, or differs from the bundle's.
    """
    found = {guide.name: guide for guide in given}
    unknown = next((name for name in found if name not in manifest.guides), None)
    if unknown is not None:
        raise CheckpointError(f"the bundle has no guide '{unknown}'", hint="Leave it out.")
    for name, config in manifest.guides.items():
        built_in = BUILT_INS.get(config.loss)
        if name not in found and built_in is not None and not built_in.file:
            found[name] = built_in.make(unet, None).named(name)
        elif name not in found:
            raise CheckpointError(
                f"the bundle has the guide '{name}'", hint="Say what it is, with --guide as at its export."
            )
        theirs = guide_spec(manifest.network, found[name].config)
        if theirs != guide_spec(manifest.network, config):
            raise CheckpointError(
                f"the guide '{name}' takes {', '.join(map(str, theirs.inputs))}, and the bundle's does not",
                hint="Say --guide as at its export.",
            )
    return {name: found[name] for name in manifest.guides}


class TorchGuides:
    """Guides in PyTorch, differentiated by autograd.

    Args:
        unet: the bundle's UNet, called with x, t and its conditions by name.
        config: configuration of the UNet.
        guides: the guides by name.
        dtype: dtype of the computation.
    """

    def __init__(
        self,
        unet: nn.Module,
        config: UNetConfig,
        guides: Mapping[str, AnyGuide],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._dtype = dtype
        self._unet = in_type(unet, dtype)
        self._config = config
        self._modules = {name: self._module(guide) for name, guide in guides.items()}
        self._configs = {name: guide.config for name, guide in guides.items()}
        self._specs = {name: guide_spec(config, guide.config) for name, guide in guides.items()}

    @torch.no_grad()
    def unet(self, feeds: Mapping[str, Array]) -> Images:
        """The UNet's output; feeds may contain further inputs."""
        out: Images = self._unet(
            **{one.name: self._tensor(feeds[one.name]) for one in unet_spec(self._config).inputs}
        ).numpy()
        return out

    def run(self, name: str, feeds: Mapping[str, Array]) -> dict[str, Images]:
        """The outputs of a guide's graph for its inputs."""
        tensors = {one.name: self._tensor(feeds[one.name]) for one in self._specs[name].inputs}
        module, config = self._modules[name], self._configs[name]
        if config.kind == "reference":
            with torch.no_grad():
                return {"out": module(**tensors).numpy()}
        tensors["x"] = tensors["x"].requires_grad_()
        with torch.enable_grad():
            results = module(*tensors.values())
            out, value = results if config.kind == "denoiser" else (None, results)
            (grad,) = torch.autograd.grad(value.sum(), tensors["x"])
        found = {} if out is None else {"out": out.detach()}
        found |= {"grad": _normalised(grad, config.normalise, found.get("out")), "value": value.detach()}
        return {output: tensor.numpy() for output, tensor in found.items()}

    def _module(self, guide: AnyGuide) -> nn.Module:
        if not isinstance(guide, Guide):
            return self._unet if guide.network is None else in_type(guide.network, self._dtype)
        own = replace(guide, loss=in_type(guide.loss, self._dtype))
        if guide.through == "unet":
            return GuidedUNet(self._unet, self._config, own).eval()
        return NoisyLoss(own).eval()

    def _tensor(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


def _normalised(grad: Tensor, how: str, out: Tensor | None) -> Tensor:
    if how == "none":
        return grad
    rms = grad.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-20)
    kind, _, number = how.partition(":")
    if kind == "unit":
        return grad / (rms * math.sqrt(grad[0].numel()))
    if kind == "cap":
        return grad * rms.clamp_max(float(number)) / rms
    assert out is not None  # only a loss of x_t has none
    return grad * out[:, : grad.shape[1]].square().mean((1, 2, 3), keepdim=True).sqrt() / rms


def float64_guides(
    unet: nn.Module, config: UNetConfig, guides: Mapping[str, AnyGuide], narrow: TorchGuides
) -> list[TorchGuides]:
    """The guides as :func:`~admtrt.verify.judged.float64_sides` has the networks: exact, and moved twice."""
    exact = TorchGuides(unet, config, guides, torch.float64)
    return [exact, *(_Moved(exact, narrow, factor) for factor in (AS_FAR_AS_PYTORCH, -AS_FAR_AS_PYTORCH))]


class _Moved(TorchGuides):
    """Float64 with the outputs of the networks and the gradients perturbed by PyTorch's rounding."""

    def __init__(self, exact: TorchGuides, narrow: TorchGuides, factor: float) -> None:
        self.__dict__.update(vars(exact))  # share the networks, which may be large
        self._exact = exact
        self._narrow = narrow
        self._factor = factor

    def unet(self, feeds: Mapping[str, Array]) -> Images:
        """See :class:`TorchGuides`."""
        return perturbed(self._exact.unet(feeds), self._narrow.unet(feeds), self._factor)

    def run(self, name: str, feeds: Mapping[str, Array]) -> dict[str, Images]:
        """See :class:`TorchGuides`; ``value`` is that of the exact side."""
        exact, narrow = self._exact.run(name, feeds), self._narrow.run(name, feeds)
        moved = {
            key: perturbed(exact[key], narrow[key], self._factor) for key in ("out", "grad") if key in exact
        }
        return exact | moved
