"""The fastest backend of this machine for each graph: measured once, then remembered.

The UNet and the gradient may run on different CPU backends; a GPU backend runs both.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from admtrt import __version__
from admtrt.config_base import Config
from admtrt.contract import CLASSIFIER_GRADIENT, GraphName, Precision
from admtrt.errors import ConfigError, EngineError
from admtrt.installing import version_of
from admtrt.memo import Memo
from admtrt.reading import parse_json
from admtrt.runtime.backends.composite import Composite
from admtrt.runtime.backends.probe import ProbeRequest, ProbeResult
from admtrt.runtime.backends.registry import BACKENDS
from admtrt.runtime.engines.plans import PlanStore
from admtrt.runtime.machine import available_threads, package_environment, processor

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from admtrt.bundle import Bundle
    from admtrt.runtime.backends.backend import Backend
    from admtrt.runtime.backends.choice import BackendChoice
    from admtrt.runtime.backends.graphs import GraphDenoiser

_MEMO = "backends"
_FAILED_FOR = 3600.0  # seconds to remember a failure: a full GPU may have room later
_TIMEOUT = 1800.0  # seconds for one backend, which may have to build engines

Seconds = Annotated[float, Field(gt=0)]


class Measured(Config):
    """Run times measured on this machine.

    Attributes:
        at: time of the measurement, in seconds since the epoch.
        seconds: seconds per run of each graph, by backend.
        failed: by backend, why it could not be measured.
    """

    at: float = 0.0
    seconds: dict[str, dict[GraphName, Seconds]] = Field(default_factory=dict)
    failed: dict[str, str] = Field(default_factory=dict)


class Fastest(Config):
    """Choice of the backend of each graph, with its reason.

    Attributes:
        graphs: the backend of each graph.
        measured: the measurement that decided.
        batch_size: batch size of the measurement.
        remembered: whether an earlier process made the measurement.
    """

    graphs: dict[GraphName, str]
    measured: Measured
    batch_size: int
    remembered: bool

    def __str__(self) -> str:
        parts = []
        for graph, chosen in self.graphs.items():
            seconds = {name: found[graph] for name, found in self.measured.seconds.items()}
            others = [f"{name} {took:.3g} s" for name, took in seconds.items() if name != chosen]
            beaten = f", {', '.join(others)}" if others else ", the only one"
            parts.append(f"{graph} on {chosen} ({seconds[chosen]:.3g} s{beaten})")
        failed = "".join(f"; {name} failed: {reason}" for name, reason in self.measured.failed.items())
        when = "measured earlier" if self.remembered else "measured now"
        return f"auto: {'; '.join(parts)}; {when} at a batch of {self.batch_size}{failed}"


def open_fastest(
    bundle: Bundle,
    choice: BackendChoice,
    *,
    graphs: Collection[GraphName] | None,
    progress: Callable[[str | Fastest], None],
) -> GraphDenoiser:
    """The bundle's graphs, each on the backend that is fastest for it here.

    Args:
        bundle: a verified bundle.
        choice: the request; fp32 admits only backends that compute in float32 throughout.
        graphs: names of the graphs to open; None for all.
        progress: told what is measured, and what was found.

    Raises:
        EngineError: if no backend works.
    """
    found = find_fastest(bundle, choice, progress=progress)
    progress(found)
    unet = found.graphs["unet"]
    guide = found.graphs.get(CLASSIFIER_GRADIENT, unet)

    def opened(name: str, graphs: Collection[GraphName] | None) -> GraphDenoiser:
        return BACKENDS[name].open(bundle, choice, graphs=graphs)

    needed = list(bundle.manifest.sampled_graphs) if graphs is None else list(graphs)
    if guide == unet or CLASSIFIER_GRADIENT not in needed:
        return opened(unet, graphs)
    others: list[GraphName] = [name for name in needed if name != CLASSIFIER_GRADIENT]
    return Composite(opened(unet, others), opened(guide, [CLASSIFIER_GRADIENT]))


def find_fastest(bundle: Bundle, choice: BackendChoice, *, progress: Callable[[str], None]) -> Fastest:
    """Find the fastest backends, from the memo if the same graphs, machine and request were measured before.

    Raises:
        EngineError: if no backend works.
    """
    precision = choice.precision
    candidates = _candidates(precision)
    key = memo_key(bundle, candidates, choice)
    memo = Memo(_MEMO)
    measured = _remembered(memo.get(key), candidates, _measured_graphs(bundle))
    remembered = measured is not None
    if measured is None:
        requests = [
            ProbeRequest(
                bundle=str(bundle.path),
                backend=backend.name,
                choice=choice,
                graphs=_measured_graphs(bundle),
            )
            for backend in candidates
        ]
        measured = _measure(requests, progress)
    if not measured.seconds:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in measured.failed.items())
        known = [backend.name for backend in BACKENDS.values() if precision in backend.precisions]
        raise EngineError(
            f"no backend on this machine runs {bundle.path} in {precision}"
            + (f" ({reasons})" if reasons else ""),
            hint=f"Backends with {precision}: {', '.join(known)}; each says what it lacks when named.",
        )
    if not remembered:
        memo.update({key: measured.to_dict()})
    return Fastest(
        graphs=fastest(measured.seconds),
        measured=measured,
        batch_size=choice.batch_size,
        remembered=remembered,
    )


def fastest(seconds: dict[str, dict[GraphName, float]]) -> dict[GraphName, str]:
    """The backends of the fastest step: the best CPU backend of each graph, or one GPU backend for all."""
    ways: list[dict[GraphName, str]] = []
    cpu = [name for name in seconds if BACKENDS[name].device == "cpu"]
    graphs = list(next(iter(seconds.values())))
    if cpu:
        ways.append({graph: min(cpu, key=lambda name: seconds[name][graph]) for graph in graphs})
    ways.extend(dict.fromkeys(graphs, name) for name in seconds if name not in cpu)
    return min(ways, key=lambda way: sum(seconds[name][graph] for graph, name in way.items()))


def _candidates(precision: Precision) -> list[Backend]:
    return [backend for backend in BACKENDS.values() if backend.admits(precision) and backend.available()]


def _measure(requests: Sequence[ProbeRequest], progress: Callable[[str], None]) -> Measured:
    seconds: dict[str, dict[GraphName, float]] = {}
    failed: dict[str, str] = {}
    for request in requests:
        choice = request.choice
        progress(f"measuring {request.backend} in {choice.precision} at a batch of {choice.batch_size}")
        found = measure_apart(request)
        if found.error:
            failed[request.backend] = found.error
        else:
            seconds[request.backend] = found.seconds
    return Measured(at=time.time(), seconds=seconds, failed=failed)


def measure_apart(request: ProbeRequest) -> ProbeResult:
    """Measure a backend in a child process. A crash of the child becomes the error."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "admtrt.runtime.backends.probe"],
            input=request.model_dump_json(),
            env=package_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return ProbeResult(error=f"it took more than {_TIMEOUT:g} s")
    try:
        return ProbeResult.from_dict(parse_json(done.stdout))
    except (ValueError, ConfigError):
        lines = done.stderr.strip().splitlines()
        last = f": {lines[-1]}" if lines else ""
        return ProbeResult(error=f"its process ended with code {done.returncode}{last}")


def _measured_graphs(bundle: Bundle) -> tuple[GraphName, ...]:
    """The UNet and the classifier's gradient: the small graphs and the guides run beside the UNet."""
    return tuple(name for name in ("unet", CLASSIFIER_GRADIENT) if name in bundle.manifest.graphs)


def _remembered(
    value: object, candidates: Sequence[Backend], graphs: tuple[GraphName, ...]
) -> Measured | None:
    """Read a measurement from the memo; None unless it fits these backends and graphs."""
    if not isinstance(value, dict):
        return None
    try:
        measured = Measured.from_dict(value)
    except ConfigError:
        return None
    names = {backend.name for backend in candidates}
    whole = all(name in names and set(found) == set(graphs) for name, found in measured.seconds.items())
    fresh = not measured.failed or 0 <= time.time() - measured.at < _FAILED_FOR
    return measured if whole and measured.seconds and fresh else None


def memo_key(bundle: Bundle, candidates: Sequence[Backend], choice: BackendChoice) -> str:
    """Everything that decides which backend is fastest."""
    store = PlanStore.of(bundle, choice.plans)
    facts = {
        "bundle": bundle.digest,
        "plans": sorted(record.plan.sha256 for record in store.records()[0] if not store.fault(record)),
        "processor": processor(),
        "cores": available_threads(),
        "gpus": _gpus(),
        "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "admtrt": __version__,
        "candidates": [backend.name for backend in candidates],
        "versions": {
            name: version_of(name) for backend in BACKENDS.values() for name in backend.distributions
        },
        "precision": choice.precision,
        "threads": choice.threads,
        "batch_size": choice.batch_size,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _gpus() -> list[str]:
    """The models of the NVIDIA GPUs, and their driver."""
    root = Path("/proc/driver/nvidia")
    lines = [
        line
        for file in (*root.glob("gpus/*/information"), *root.glob("version"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    kept = ("Model:", "NVRM version:")
    return sorted(line.partition(":")[2].strip() for line in lines if line.startswith(kept))
