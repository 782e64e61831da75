"""One row in a child process: opens its denoiser and takes timed steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from admtrt.bench.remote import peak_memory
from admtrt.bench.rows import COMPILED, EAGER, ORIGINAL, PEERS, PLAIN, takes_plans
from admtrt.bundle import Bundle
from admtrt.contract import graph_of
from admtrt.runtime.backends.choice import AUTO, BackendChoice
from admtrt.runtime.backends.opening import open_denoiser
from admtrt.runtime.backends.registry import BACKENDS
from admtrt.runtime.example import example_labels, example_scale, example_slots, held_step
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.sampler import ResidentDenoiser, advance, guide_feeds, step_inputs

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from admtrt.bench.plain import PlainExport
    from admtrt.bench.rows import Device, Row
    from admtrt.bench.subject import Subject
    from admtrt.contract import GraphName
    from admtrt.runtime.sampler import Denoiser
    from admtrt.runtime.slots import Array, Slots

_COMPARED = ("out", "grad")
"""Outputs of the networks that are compared between rows."""


@dataclass(frozen=True)
class Prepared:
    """The result of preparing a row for a batch size.

    Attributes:
        ready: seconds until the end of the first step, with loading, compiling and tuning.
        outputs: outputs of the graphs for the inputs common to all rows: ``out``, ``grad`` if guided, and
            that of each guide's graph under the graph's name.
        notes: the backend's notes on its choices.
    """

    ready: float
    outputs: Mapping[str, Array]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one guided step and of its graphs.

    Attributes:
        step: the whole step.
        unet: the UNet.
        classifier_gradient: the gradient; None without guidance.
        outside: time of the step outside its graphs. None if x stays on a device, where graphs are timed
            separately.
        guides: the graph of each further guide that the row can run, by name.
    """

    step: float
    unet: float
    classifier_gradient: float | None
    outside: float | None
    guides: Mapping[str, float] = field(default_factory=dict)


class Contender:
    """A row.

    Args:
        row: the row to run.
        subject: the subject to run it on.
        device: device of PyTorch's rows.
        threads: CPU threads of every library.
        exports: graphs of the row ``plain-onnx`` by batch size.
    """

    def __init__(
        self,
        row: Row,
        subject: Subject,
        device: Device,
        threads: int,
        exports: Mapping[int, PlainExport],
    ) -> None:
        self._row = row
        self._subject = subject
        self._device: Device = device
        self._threads = threads
        self._exports = exports
        self._notes: list[str] = []
        began = time.perf_counter()
        self._bundle = Bundle.open(subject.bundle)
        self._denoiser: Denoiser | None = None if self._one_batch_only else self._open(1)
        self._opened = time.perf_counter() - began
        self._slots: Slots | None = None
        self._led: dict[str, tuple[GraphName, dict[str, Array]]] = {}

    @property
    def _one_batch_only(self) -> bool:
        return self._row.name in (PLAIN, AUTO)

    def prepare(self, batch: int) -> Prepared:
        """Prepare a batch size: compile, take a first step, and warm up."""
        began = time.perf_counter()
        if self._one_batch_only:
            self._denoiser = None  # free it before opening the next one
            self._denoiser = self._open(batch)
        self._slots = example_slots(self._bundle.manifest, batch)
        first, _ = self._watched_step()
        ready = time.perf_counter() - began + self._opened
        self._opened = 0.0
        self._led = self._guide_inputs(batch)
        assert self._denoiser is not None
        led = {graph: _gradient(self._denoiser.run(graph, feeds)) for graph, feeds in self._led.values()}
        self.step()
        notes, self._notes = tuple(self._notes), []
        return Prepared(ready=ready, outputs=first.outputs | led, notes=notes)

    def step(self) -> StepTime:
        """Repeat the same guided step."""
        watch, seconds = self._watched_step()
        denoiser, slots = self._denoiser, self._slots
        assert slots is not None
        held = held_step(denoiser, slots) if isinstance(denoiser, ResidentDenoiser) else None
        return StepTime(
            step=seconds if held is None else held,
            unet=watch.seconds["unet"],
            classifier_gradient=watch.seconds.get("classifier_gradient"),
            outside=seconds - sum(watch.seconds.values()) if held is None else None,
            guides={name: self._timed(graph, feeds) for name, (graph, feeds) in self._led.items()},
        )

    def sample(self, steps: int) -> float:
        """Seconds of a whole run of ``steps`` steps with the prepared batch."""
        assert self._slots is not None
        assert self._denoiser is not None
        slots = self._slots
        labels = example_labels(self._bundle.manifest, len(slots))
        pipeline = Pipeline(self._bundle, self._denoiser)
        began = time.perf_counter()
        pipeline(
            None if labels is None else labels.tolist(),
            slots.seeds,
            steps=steps,
            scale=example_scale(self._bundle.manifest),
            low_res=slots.conditions["unet"].get("low_res"),
            batch_size=len(slots),
        )
        return time.perf_counter() - began

    def memory(self) -> int:
        """The largest resident memory so far, in bytes."""
        return peak_memory()

    def guide_memory(self, guide: str, batch: int) -> int:
        """The same after evaluations of a guide's graph, which is all that this process is to run."""
        if self._one_batch_only:
            self._denoiser = self._open(batch)
        graph, feeds = self._guide_inputs(batch)[guide]
        for _ in range(2):
            self._timed(graph, feeds)
        return peak_memory()

    def _open(self, batch: int) -> Denoiser:
        if self._row.name in (ORIGINAL, EAGER, COMPILED):
            from admtrt.bench.torch_rows import open_torch_row

            return open_torch_row(self._row, self._subject, self._device, self._threads)
        if self._row.name == PLAIN:
            from admtrt.bench.plain import PlainDenoiser

            return PlainDenoiser(self._bundle, self._exports[batch], self._threads)
        on_cpu = self._row.name == AUTO or BACKENDS[self._row.name].device == "cpu"
        choice = BackendChoice(
            self._row.name,
            self._row.precision,
            threads=self._threads if on_cpu else None,
            plans=self._subject.plans if takes_plans(self._row) else None,
            batch_size=batch,
        )
        return open_denoiser(self._bundle, choice, progress=lambda said: self._notes.append(str(said)))

    def _guide_inputs(self, batch: int) -> dict[str, tuple[GraphName, dict[str, Array]]]:
        """The graph of each guide that has its own, and its inputs, by the guide's name."""
        manifest = self._bundle.manifest
        guides = {name: manifest.guides[name] for name in self._guides()}
        if not guides:
            return {}
        led = example_slots(manifest, batch, led=True)
        inputs = step_inputs(led)
        return {
            name: (graph_of(name, guide), guide_feeds(led, inputs, name))
            for name, guide in guides.items()
            if graph_of(name, guide) != "unet"
        }

    def _guides(self) -> Collection[str]:
        """Names of the guides that the row can run."""
        if self._row.name not in PEERS:
            return self._bundle.manifest.guides
        if self._row.name == PLAIN:
            return ()
        from admtrt.bench.torch_rows import GuidedDenoiser

        return self._denoiser.guides if isinstance(self._denoiser, GuidedDenoiser) else ()

    def _timed(self, graph: GraphName, feeds: Mapping[str, Array]) -> float:
        assert self._denoiser is not None
        began = time.perf_counter()
        self._denoiser.run(graph, feeds)
        return time.perf_counter() - began

    def _watched_step(self) -> tuple[_Stopwatch, float]:
        """Take one step from host memory, with every graph timed separately."""
        assert self._slots is not None
        assert self._denoiser is not None
        watch = _Stopwatch(self._denoiser)
        start = self._slots.x, self._slots.position.copy()
        began = time.perf_counter()
        advance(self._slots, watch)
        seconds = time.perf_counter() - began
        self._slots.x, self._slots.position = start
        return watch, seconds


def measure_guide_memory(
    row: Row, subject: Subject, device: Device, threads: int, guide: str, batch: int
) -> int:
    """Peak memory of a process that runs only a guide's graph, as runs do that it guides at every step."""
    return Contender(row, subject, device, threads, {}).guide_memory(guide, batch)


def _gradient(results: Mapping[str, Array]) -> Array:
    """The output of a guide's graph that rows are judged by: a reference has no gradient."""
    return results["grad"] if "grad" in results else results["out"]


class _Stopwatch:
    """A denoiser that times another denoiser's graphs and keeps their outputs."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self.seconds: dict[str, float] = {}
        self.outputs: dict[str, Array] = {}

    def run(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        began = time.perf_counter()
        results = self._denoiser.run(graph, feeds)
        self.seconds[graph] = time.perf_counter() - began
        self.outputs |= {name: results[name] for name in _COMPARED if name in results}
        return results
