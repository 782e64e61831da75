"""Compare a bundle's guides with autograd: their gradients, and samples guided by them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from admtrt.contract import graph_of, guide_spec, unet_spec
from admtrt.errors import CheckpointError
from admtrt.export.guides.graphs import GuidedUNet, NoisyLoss
from admtrt.export.guides.guide import Guide
from admtrt.export.guides.named import BUILT_INS
from admtrt.models.diffusion import Diffusion
from admtrt.models.solvers import sample_step
from admtrt.runtime.example import example_targets
from admtrt.runtime.noise import step_noise
from admtrt.runtime.sampler import advance, guide_feeds, step_inputs
from admtrt.runtime.slots import slots_for
from admtrt.schedule.guides import GuideChoice
from admtrt.schedule.process import process_from_config
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import sampling_schedule
from admtrt.verify.checked import GraphRunError
from admtrt.verify.inputs import chosen_steps, step_batches
from admtrt.verify.reference import in_type
from admtrt.verify.report import Place, Tally, sample_errors
from admtrt.verify.tolerances import TOLERANCES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from admtrt.bundle import Manifest
    from admtrt.config import DiffusionConfig, UNetConfig
    from admtrt.export.guides.guide import AnyGuide
    from admtrt.models.checkpoint import LoadedNetwork
    from admtrt.runtime.sampler import Denoiser
    from admtrt.runtime.slots import Array, Images, Slots
    from admtrt.schedule.process import Process
    from admtrt.verify.inputs import Inputs
    from admtrt.verify.report import Row


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


@dataclass(frozen=True, eq=False)
class GuideComparison:
    """Compares every guide of a bundle with autograd.

    Attributes:
        manifest: of the bundle.
        process: the checkpoint's process.
        guides: the guides in PyTorch.
        inputs: makes the networks' inputs.
        graphs: the bundle's graphs.
        compare: runs a graph on one batch and adds each output's errors to its tally.
        steps: steps of the samples.
        seeds: seeds of their noise.
    """

    manifest: Manifest
    process: DiffusionConfig
    guides: TorchGuides
    inputs: Inputs
    graphs: Denoiser
    compare: Callable[..., None]
    steps: int
    seeds: list[int]

    def graph_rows(self) -> list[Row]:
        """Rows for the graphs of guides, over the base process."""
        rows, base = [], process_from_config(self.process)
        for name, config in self.manifest.guides.items():
            graph, spec = graph_of(name, config), guide_spec(self.manifest.network, config)
            tallies = {
                one.name: Tally("graph", f"{graph}: {one.name}", _tolerance(one.name)) for one in spec.outputs
            }
            for shift, steps in enumerate(step_batches(len(base))):
                slots = self._slots(name, base, steps, shift)
                feeds = guide_feeds(slots, step_inputs(slots), name)
                places = [Place(t=t, y=None, batch=len(steps)) for t in feeds["t"].tolist()]
                self.compare(graph, tallies, feeds, self.guides.run(name, feeds), places)
            rows += [tally.row() for tally in tallies.values()]
        return rows

    def step_rows(self) -> list[Row]:
        """Rows for one guided evaluation from the same x_t, compared with the textbook step."""
        rows, process = [], process_from_config(self.process, str(self.steps))
        for name in self.manifest.guides:
            tally = Tally("step", f"guide {name}: x_prev", TOLERANCES["guide"])
            for shift, step in enumerate(chosen_steps(len(process))):
                slots = self._slots(name, process, np.full(len(self.seeds), step), shift)
                places = [Place(t=float(process.model_t[step]), y=None, batch=len(slots))] * len(slots)
                expected = self._stepped(name, process, step, slots)
                try:
                    advance(slots, self.graphs)
                except GraphRunError as error:
                    tally.fail("run", error.message)
                    break
                tally.add(sample_errors(slots.x, expected), places)
            rows.append(tally.row())
        return rows

    def _choice(self, name: str) -> GuideChoice:
        config = self.manifest.guides[name]
        return GuideChoice(name=name, scale=config.scale or 1.0, place=config.place, clip=config.clip)

    def _sampler(self, name: str, process: Process) -> SamplerConfig:
        """DDIM, or DDPM for a guide with the place ``variance``."""
        choice = self._choice(name)
        method = "ddpm" if choice.place == "variance" else "ddim"
        return SamplerConfig(method=method, steps=str(len(process)), scale=0.0, guided_by=(choice,))

    def _slots(self, name: str, process: Process, steps: NDArray[np.int64], shift: int) -> Slots:
        """Slots at given steps of a process, each a noised image."""
        count, sampler = len(steps), self._sampler(name, process)
        schedule = sampling_schedule(self.manifest.diffusion, sampler)
        slots = slots_for(
            self.manifest.network,
            None,
            [schedule] * count,
            [*self.seeds, *range(count)][:count],
            labels=self.inputs.labels(count, shift),
            low_res=self.inputs.low_res(count),
            guided=False,
            latents=self.inputs.noisy_images(process.alpha_bar[steps]),
            guides=self.manifest.guides,
            targets={name: example_targets(self.manifest.guides[name], count, shift)},
        )
        slots.position[:] = len(process) - 1 - steps
        return slots

    def _stepped(self, name: str, process: Process, step: int, slots: Slots) -> Images:
        """The state after one step as in the papers, in float64 except for the networks."""
        sampler = self._sampler(name, process)
        choice, config = sampler.guided_by[0], self.manifest.guides[name]
        feeds = guide_feeds(slots, step_inputs(slots), name)
        results = self.guides.run(name, feeds)
        own = {**feeds, **slots.conditions["unet"]}
        out = results["out"] if config.kind == "denoiser" else self.guides.unet(own)
        channels = slots.x.shape[1]
        value, *learned = torch.split(torch.from_numpy(out).double(), channels, dim=1)
        a = process.alpha_bar[step]
        if choice.place == "reference":
            other = torch.from_numpy(results["out"]).double()[:, :channels]
            value = other + choice.scale * (value - other)
            grad = None
        else:
            grad = torch.from_numpy(results["grad"]).double()
        if choice.place == "before_clip":
            assert grad is not None
            weight = -np.sqrt(1 / a - 1) if self.process.mean_type == "eps" else 1.0
            value = value + choice.scale * (1 - a) / np.sqrt(a) / weight * grad
        scores = choice.place in ("score", "variance")
        textbook = sampler.model_copy(update={"scale": choice.scale if scores else 0.0})
        noise = step_noise(slots.seeds, [step] * len(slots), slots.x.shape[1:], stage=slots.stage)
        x, _ = sample_step(
            Diffusion(self.process, process, torch.float64),
            torch.cat([value, *learned], 1),
            torch.from_numpy(slots.x).double(),
            torch.full((len(slots),), step),
            torch.from_numpy(noise).double(),
            grad if scores else None,
            textbook,
        )
        if choice.place == "shift":
            assert grad is not None
            x = x + choice.scale * grad
        stepped: Images = x.numpy()
        return stepped


def _tolerance(output: str) -> float:
    return TOLERANCES["guide" if output == "grad" else "graph"]
