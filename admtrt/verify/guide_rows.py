"""Compare a bundle's guides with autograd: their gradients, steps, and whole samples guided by them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from admtrt.contract import graph_of, guide_spec
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
from admtrt.verify.both import Sides
from admtrt.verify.checked import GraphRunError
from admtrt.verify.inputs import chosen_steps, step_batches
from admtrt.verify.judged import JudgedRow
from admtrt.verify.report import Place, Tally
from admtrt.verify.tolerances import TOLERANCES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from admtrt.bundle import Manifest
    from admtrt.config import DiffusionConfig
    from admtrt.runtime.sampler import Denoiser
    from admtrt.runtime.slots import Images, Slots
    from admtrt.schedule.process import Process
    from admtrt.verify.guides import TorchGuides
    from admtrt.verify.inputs import Inputs
    from admtrt.verify.report import Row


@dataclass(frozen=True, eq=False)
class GuideComparison:
    """Compares every guide of a bundle with autograd.

    Attributes:
        manifest: of the bundle.
        process: the checkpoint's process.
        guides: the guides in PyTorch.
        float64: returns those of :func:`~admtrt.verify.guides.float64_guides`; called only if needed.
        inputs: makes the networks' inputs.
        graphs: the bundle's graphs.
        compare: runs a graph on one batch and adds each output's errors to its tally.
        steps: steps of the samples.
        seeds: seeds of their noise.
    """

    manifest: Manifest
    process: DiffusionConfig
    guides: TorchGuides
    float64: Callable[[], list[TorchGuides]]
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
            judged = JudgedRow("step", f"guide {name}: x_prev")
            for shift, step in enumerate(chosen_steps(len(process))):
                slots = self._slots(name, process, np.full(len(self.seeds), step), shift)
                places = [Place(t=float(process.model_t[step]), y=None, batch=len(slots))] * len(slots)
                stepped = partial(self._stepped, name, process, step, slots.take(range(len(slots))))
                try:
                    advance(slots, self.graphs)
                except GraphRunError as error:
                    judged.tally.fail("run", error.message)
                    break
                lost = np.zeros(len(slots), bool)
                judged.add(slots.x, stepped(self.guides), self._float64(stepped), places, lost)
            rows.append(judged.row())
        return rows

    def _float64(self, stepped: Callable[[TorchGuides], Images]) -> Callable[[], list[Images]]:
        return lambda: [stepped(side) for side in self.float64()]

    def sides(self, name: str) -> Sides[TorchGuides]:
        """Whole samples guided by one guide, from x_T, on both sides."""
        process = process_from_config(self.process, str(self.steps))
        slots = self._started(name, process, len(self.seeds), 0)
        states = partial(self._states, name, process, slots.take(range(len(slots))))
        return Sides(slots, states, self.guides, self.float64)

    def _states(self, name: str, process: Process, start: Slots, side: TorchGuides) -> Iterator[Images]:
        """The states of a side, float64 after the first; ``start`` is left as it is."""
        slots = start.take(range(len(start)))
        yield slots.x
        for step in reversed(range(len(process))):
            slots.x = self._stepped(name, process, step, slots, side)
            slots.position += 1
            yield slots.x

    def _choice(self, name: str) -> GuideChoice:
        config = self.manifest.guides[name]
        return GuideChoice(name=name, scale=config.scale or 1.0, place=config.place, clip=config.clip)

    def _sampler(self, name: str, process: Process) -> SamplerConfig:
        """DDIM, or DDPM for a guide with the place ``variance``."""
        choice = self._choice(name)
        method = "ddpm" if choice.place == "variance" else "ddim"
        return SamplerConfig(method=method, steps=str(len(process)), scale=0.0, guided_by=(choice,))

    def _started(
        self, name: str, process: Process, count: int, shift: int, latents: Images | None = None
    ) -> Slots:
        """Slots at the start of a process; x_T is noise of the seeds unless given."""
        schedule = sampling_schedule(self.manifest.diffusion, self._sampler(name, process))
        return slots_for(
            self.manifest.network,
            None,
            [schedule] * count,
            [*self.seeds, *range(count)][:count],
            labels=self.inputs.labels(count, shift),
            low_res=self.inputs.low_res(count),
            guided=False,
            latents=latents,
            guides=self.manifest.guides,
            targets={name: example_targets(self.manifest.guides[name], count, shift)},
        )

    def _slots(self, name: str, process: Process, steps: NDArray[np.int64], shift: int) -> Slots:
        """Slots at given steps of a process, each a noised image."""
        noisy = self.inputs.noisy_images(process.alpha_bar[steps])
        slots = self._started(name, process, len(steps), shift, noisy)
        slots.position[:] = len(process) - 1 - steps
        return slots

    def _stepped(self, name: str, process: Process, step: int, slots: Slots, side: TorchGuides) -> Images:
        """The state after one step as in the papers, in float64 except for the networks of a side."""
        sampler = self._sampler(name, process)
        choice, config = sampler.guided_by[0], self.manifest.guides[name]
        feeds = guide_feeds(slots, step_inputs(slots), name)
        results = side.run(name, feeds)
        own = {**feeds, **slots.conditions["unet"]}
        out = results["out"] if config.kind == "denoiser" else side.unet(own)
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
