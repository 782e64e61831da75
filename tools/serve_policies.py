"""Order and batching of the server, side by side: step batching and the usual server.

    python tools/serve_policies.py BUNDLE --backend openvino --requests 200

Six kinds of request (10 to 100 steps, guided and not, three scales), one sample each, in seeded Poisson
arrivals. With one thread the clock is the CPU time of this process, so that whatever else the machine does
changes little; with more it is the time of day, and the machine has to be idle. Idle moments are jumped over.
Loads are multiples of the capacity without batching, latencies are in mean steps of a lone sample. The engine
is the server's, without HTTP. The static servers batch up to the largest of --sizes, the server's own policy
up to its measured cap.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from admtrt.runtime.pipeline import Pipeline
from admtrt.serve.admission import Bounds
from admtrt.serve.engine import Engine
from admtrt.serve.flight import Done, Flight
from admtrt.serve.model import Model
from admtrt.serve.policy import policy_named

KINDS = [("10", True), ("25", True), ("50", True), ("100", True), ("25", False), ("50", False)]
SCALES = (1.0, 2.0, 4.0)
BOUND = 300
"""Mean steps of a lone sample that 95% of the answers may take, where throughput is compared."""
UNBOUNDED = Bounds(requests=10**9, timeout=1e12, client_share=1.0)
SERVERS = {"fair": "fair", "no batching": "static", "static": "static", "static-any": "static-any"}
"""Policies. The server's own measures its cap first, before more sizes are compiled."""


class Clock:
    """Seconds of work, and the idle moments that were jumped over."""

    def __init__(self, threads: int) -> None:
        self._work = time.process_time if threads == 1 else time.perf_counter
        self._jumped = 0.0

    def __call__(self) -> float:
        """Now."""
        return self._work() + self._jumped

    def jump(self, until: float) -> None:
        """Have it be later."""
        self._jumped += max(0.0, until - self())


class Bench:
    """Runs workloads through engines of one model that are driven step by step."""

    def __init__(self, bundle: Path, backend: str, threads: int, kinds: Any, sizes: tuple[int, ...]) -> None:
        self.model = Model("bench", Pipeline.from_bundle(bundle, backend=backend, threads=threads))
        self.clock = Clock(threads)
        self.kinds = kinds
        self.classes = self.model.num_classes
        self.engines: dict[str, Engine] = {}
        chosen = {"fair": (), "no batching": (1,)}
        for name, order in SERVERS.items():
            engine = Engine(
                self.model,
                policy=policy_named(order),  # type: ignore[arg-type]
                bounds=UNBOUNDED,
                clock=self.clock,
                sizes=chosen.get(name, sizes),
            )
            engine.warm()
            self.engines[name] = engine
        self.unit = statistics.fmean(self.alone(kind) for kind in kinds)

    def flight(self, number: int, kind: tuple[str, bool], answered: Any) -> Flight:
        """One request of a kind."""
        steps, guided = kind
        scale = (
            SCALES[number % len(SCALES)]
            if guided and self.model.pipelines[0].bundle.manifest.classifier
            else 0.0
        )
        labels = None if self.classes is None else [number % self.classes]
        if (
            labels is not None
            and not scale
            and self.model.pipelines[0].bundle.manifest.network.num_classes is None
        ):
            labels = [0]
        return Flight(self.model.draw(labels, [number], choices={"steps": steps, "scale": scale}), answered)

    def alone(self, kind: tuple[str, bool]) -> float:
        """Seconds of a step of a lone sample."""
        times = []
        for number in range(3):
            began = self.clock()
            self.drive("no batching", [(began, kind)], first=number)
            times.append((self.clock() - began) / int(kind[0]))
        return min(times)

    def drive(
        self,
        name: str,
        arrivals: list[tuple[float, tuple[str, bool]]],
        *,
        first: int = 0,
        bound: float = math.inf,
    ) -> list[float]:
        """Latency of each request, in seconds; ends early once more than 5% took longer than ``bound``."""
        engine, pending = self.engines[name], list(reversed(arrivals))
        latencies: list[float] = []
        while pending or engine.flights:
            if sum(one > bound for one in latencies) > 0.05 * len(arrivals):
                for flight in engine.flights:
                    engine.cancel(flight)
                pending.clear()
            while pending and pending[-1][0] <= self.clock():
                due, kind = pending.pop()
                number = first + len(arrivals) - len(pending)

                def answered(event: Any, due: float = due) -> None:
                    if isinstance(event, Done):
                        latencies.append(self.clock() - due)

                engine.let_in(self.flight(number, kind, answered))
            if engine.flights:
                engine.turn()
            elif pending:
                self.clock.jump(pending[-1][0])
        return latencies

    def highest(self, name: str, most: float, count: int, bound: float) -> float:
        """The highest rate, at most ``most``, at which 95% of the requests take at most ``bound`` seconds."""
        low, high = 0.05 * most, most
        for _ in range(6):
            middle = (low + high) / 2
            latencies = self.drive(name, self.workload(middle, count, 200), bound=bound)
            holds = len(latencies) == count and percentile(latencies, 0.95) <= bound
            low, high = (middle, high) if holds else (low, middle)
        return low

    def workload(self, rate: float, count: int, seed: int) -> list[tuple[float, tuple[str, bool]]]:
        """Requests and when they come."""
        generator, at = random.Random(seed), self.clock() + 0.01
        arrivals = []
        for _ in range(count):
            at += generator.expovariate(rate)
            arrivals.append((at, generator.choice(self.kinds)))
        return arrivals


def percentile(values: list[float], share: float) -> float:
    """The value below which this share lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="1,2,3,4,6,8,12,16", help="batches of the static servers")
    parser.add_argument("--loads", default="0.8,1.5")
    parser.add_argument(
        "--divide", type=int, default=1, help="steps of all kinds divided by this, for slow models"
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    kinds = [(str(max(2, int(steps) // given.divide)), guided) for steps, guided in KINDS]
    sizes = tuple(map(int, given.sizes.split(",")))
    bench = Bench(given.bundle, given.backend, given.threads, kinds, sizes)

    def shown(*text: Any) -> None:
        print(*text, file=sys.stderr if given.json else sys.stdout, flush=True)

    cap = bench.engines["fair"].stations[0].sizes.cap
    shown(
        f"static: batches of {given.sizes}; fair: a measured cap of {cap}; "
        f"a lone sample's mean step {bench.unit * 1e3:.3f} ms"
    )
    result: dict[str, Any] = {
        "backend": given.backend,
        "threads": given.threads,
        "sizes": given.sizes,
        "cap": cap,
        "unit": bench.unit,
    }
    saturated: dict[str, list[float]] = {name: [] for name in SERVERS}
    for number in range(given.rounds):
        for name in SERVERS:
            began = bench.clock()
            bench.drive(name, bench.workload(1e9, given.requests, number))
            saturated[name].append(given.requests / (bench.clock() - began))
    best = {name: statistics.median(values) for name, values in saturated.items()}
    capacity = best["no batching"]
    shown("saturated, over no batching:", {name: round(value / capacity, 2) for name, value in best.items()})
    result |= {"capacity": capacity, "saturated": best, "loads": {}}
    for load in map(float, given.loads.split(",")):
        row: dict[str, Any] = {}
        pooled: dict[str, list[float]] = {name: [] for name in SERVERS}
        for number, name in itertools.product(range(given.rounds), SERVERS):
            pooled[name] += bench.drive(name, bench.workload(load * capacity, given.requests, 100 + number))
        for name, values in pooled.items():
            row[name] = {
                key: percentile(values, share) / bench.unit for key, share in (("p50", 0.5), ("p95", 0.95))
            }
        result["loads"][str(load)] = row
        told = {name: f"{one['p50']:.0f} / {one['p95']:.0f}" for name, one in row.items()}
        shown(f"load {load:g}, p50 / p95 in mean steps:", told)
    bound = BOUND * bench.unit / given.divide
    highest = {
        name: bench.highest(name, 1.2 * value, given.rounds * given.requests, bound) / capacity
        for name, value in best.items()
    }
    result["highest"] = highest
    shown(
        f"highest load with p95 <= {BOUND} steps:", {name: round(value, 2) for name, value in highest.items()}
    )
    engine = bench.engines["fair"]
    overhead = 1 - engine.graph_seconds / engine.busy
    shown(f"engine outside the graphs: {overhead:.1%} of its steps' time")
    result["outside_graphs"] = overhead
    if given.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
