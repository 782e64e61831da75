"""Measure the run time of each graph on one backend. :mod:`.auto` runs this module in a child process.

In a child process, no other threads or memory disturb the measurement, and a crash of the library ends only
the child. ``python -m`` this module reads a :class:`ProbeRequest` on stdin and writes a :class:`ProbeResult`
on stdout.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from pydantic import Field

from admtrt.bundle import Bundle
from admtrt.config_base import Config
from admtrt.contract import GraphName
from admtrt.errors import AdmtrtError
from admtrt.runtime.backends.choice import BackendChoice
from admtrt.runtime.backends.registry import BACKENDS
from admtrt.runtime.example import example_slots, held_step
from admtrt.runtime.sampler import ResidentDenoiser, step_inputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admtrt.runtime.sampler import Denoiser
    from admtrt.runtime.slots import Slots

_RUNS = 3  # minimum, after a first run that compiles and warms up
_SECONDS = 0.5  # minimum; small graphs run more often
_LEAST = 1e-9  # seconds, for a graph that is hidden behind a longer one


class ProbeRequest(Config):
    """Request of one measurement: which graphs to time on which backend."""

    bundle: str
    backend: str
    choice: BackendChoice
    graphs: tuple[GraphName, ...]


class ProbeResult(Config):
    """The shortest run of each graph, or why it could not be measured."""

    seconds: dict[GraphName, float] = Field(default_factory=dict)
    error: str = ""


def measure(request: ProbeRequest) -> ProbeResult:
    """Open each graph alone and time it. Backends that keep x on their device are timed on whole steps."""
    bundle = Bundle.open(request.bundle)
    seconds: dict[GraphName, float] = {}
    for name in request.graphs:
        try:
            denoiser = BACKENDS[request.backend].open(bundle, request.choice, graphs=(name,))
            slots = example_slots(bundle.manifest, request.choice.batch_size)
            if isinstance(denoiser, ResidentDenoiser):  # such a backend opens all graphs together
                return ProbeResult(seconds=_seconds_on_device(denoiser, slots, request.graphs))
            seconds[name] = _fastest_run(denoiser, name, slots)
        except AdmtrtError as error:
            return ProbeResult(error=error.message)
        del denoiser
    return ProbeResult(seconds=seconds)


def _fastest_run(denoiser: Denoiser, name: GraphName, slots: Slots) -> float:
    feeds = {"x": slots.x, "t": step_inputs(slots).t, **slots.conditions[name]}
    runs = list[float]()
    while len(runs) <= _RUNS or sum(runs[1:]) < _SECONDS:
        start = time.perf_counter()
        denoiser.run(name, feeds)
        runs.append(time.perf_counter() - start)
    return min(runs[1:])


def _seconds_on_device(
    denoiser: ResidentDenoiser, slots: Slots, graphs: Sequence[GraphName]
) -> dict[GraphName, float]:
    """Time the UNet as a step without guidance, the gradient as the extra time of a guided step."""
    conditions, parts = slots.conditions, dict[GraphName, float]()
    for name in graphs:
        slots.conditions = {"unet": conditions["unet"]} if name == "unet" else conditions
        held_step(denoiser, slots)  # compiles and captures
        step = min(held_step(denoiser, slots) for _ in range(_RUNS))
        parts[name] = max(step - sum(parts.values()), _LEAST)
    return parts


if __name__ == "__main__":
    found = measure(ProbeRequest.model_validate_json(sys.stdin.read()))
    sys.stdout.write(found.model_dump_json())
