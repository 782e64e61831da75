"""Seconds of each graph on one backend, measured in a process of its own; :mod:`.auto` starts it.

In a process of its own nothing else's threads or memory disturb the measurement, and a library that crashes
takes only itself along. ``python -m`` this module reads a :class:`ProbeRequest` on stdin and writes a
:class:`ProbeResult` on stdout.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from admtrt.bundle import Bundle
from admtrt.config import Config, Positive
from admtrt.contract import GraphName, Precision
from admtrt.errors import AdmtrtError
from admtrt.runtime.backends.registry import BACKENDS

if TYPE_CHECKING:
    from admtrt.contract import GraphSpec
    from admtrt.runtime.sampler import Denoiser

_RUNS = 3  # at least, and after one that compiles and warms up
_SECONDS = 0.5  # at least; small graphs run more often


class ProbeRequest(Config):
    """What is to be measured."""

    bundle: str
    backend: str
    precision: Precision
    threads: Positive | None
    plans: str | None = None
    batch_size: Positive
    graphs: tuple[GraphName, ...]


class ProbeResult(Config):
    """The shortest of some runs of each graph, or why there is none."""

    seconds: dict[GraphName, float] = Field(default_factory=dict)
    error: str = ""


def measure(request: ProbeRequest) -> ProbeResult:
    """Open each graph by itself and run it."""
    bundle = Bundle.open(request.bundle)
    seconds: dict[GraphName, float] = {}
    for name in request.graphs:
        try:
            denoiser = BACKENDS[request.backend].open(
                bundle,
                request.precision,
                threads=request.threads,
                plans=None if request.plans is None else Path(request.plans),
                graphs=(name,),
            )
            seconds[name] = _fastest_run(denoiser, name, bundle, request.batch_size)
        except AdmtrtError as error:
            return ProbeResult(error=error.message)
        del denoiser
    return ProbeResult(seconds=seconds)


def _fastest_run(denoiser: Denoiser, name: GraphName, bundle: Bundle, batch: int) -> float:
    feeds = _feeds(bundle.graph_entry(name).spec, batch, bundle.manifest.diffusion.steps / 2)
    runs: list[float] = []
    while len(runs) <= _RUNS or sum(runs[1:]) < _SECONDS:
        start = time.perf_counter()
        if name == "unet":
            denoiser.unet(feeds["x"], feeds["t"], feeds.get("y"), feeds.get("low_res"))
        else:
            denoiser.classifier_gradient(feeds["x"], feeds["t"], feeds["y"])
        runs.append(time.perf_counter() - start)
    return min(runs[1:])


def _feeds(spec: GraphSpec, batch: int, t: float) -> dict[str, Any]:
    """Noise for images, one timestep, the first class."""
    generator = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for tensor in spec.inputs:
        shape = tensor.sized(batch)
        if tensor.dtype == "int64":
            feeds[tensor.name] = np.zeros(shape, dtype=np.int64)
        elif tensor.name == "t":
            feeds[tensor.name] = np.full(shape, t, dtype=np.float32)
        else:
            feeds[tensor.name] = generator.standard_normal(shape, dtype=np.float32)
    return feeds


if __name__ == "__main__":
    found = measure(ProbeRequest.model_validate_json(sys.stdin.read()))
    sys.stdout.write(found.model_dump_json())
