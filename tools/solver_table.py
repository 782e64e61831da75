"""What solvers are worth: class accuracy, diversity and distance from the converged result, by evaluations.

admtrt demo --out OUT
python tools/solver_table.py OUT/bundle > table.md
python tools/solver_table.py fashion.bundle --config configs/fashion-mnist.toml --samples 200

Every cell is accuracy in percent / diversity / distance in grey levels. Accuracy and diversity are those of
the demo's judge, a support vector machine fitted on held-out images; read them together: too few evaluations
over-guide, which raises the first and lowers the second. Distance is the root mean square from the converged
solution of the guided ODE from the same starts (2M, 100 evaluations); DDPM and SDE solvers follow no such
path, so they have none.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from admtrt.config_files import load_config
from admtrt.console import progress
from admtrt.demo.judge import Judge
from admtrt.demo.run import demo_config
from admtrt.errors import AdmtrtError
from admtrt.images import save_grid
from admtrt.run_config import RunConfig
from admtrt.runtime.pipeline import Pipeline, Samples

EVALUATIONS = (5, 8, 10, 15, 25)
ODD = {8: 7, 10: 9}
"""What a solver spends that takes odd numbers alone."""
CONVERGED: dict[str, Any] = {"method": "dpmpp", "steps": 100}
BATCH = 100


@dataclass(frozen=True)
class Line:
    """A row of the table: a sampler of which the number of evaluations changes."""

    name: str
    choices: dict[str, Any]
    odd: bool = False
    stochastic: bool = False

    def at(self, count: int) -> dict[str, Any]:
        """The sampler with so many evaluations."""
        return {**self.choices, "steps": ODD.get(count, count) if self.odd else count}


LINES = (
    Line("DDPM", {"method": "ddpm"}, stochastic=True),
    Line("DDIM", {"method": "ddim"}),
    Line("DPM-Solver++(2M)", {"method": "dpmpp"}),
    Line("2M, logSNR", {"method": "dpmpp", "grid": "logsnr"}),
    Line("3M", {"method": "dpmpp", "order": 3}),
    Line("2S", {"method": "dpmpp", "form": "single"}),
    Line("3S", {"method": "dpmpp", "form": "single", "order": 3}),
    Line("SDE-2M", {"method": "dpmpp", "sde": True}, stochastic=True),
    Line("UniPC-2", {"method": "unipc"}),
    Line("UniPC-2, bh1", {"method": "unipc", "variant": "bh1"}),
    Line("UniPC-3", {"method": "unipc", "order": 3}),
    Line("Euler, time-uniform", {"method": "euler", "grid": "time_uniform"}),
    Line("Heun, Karras (5, 7, 9, 15, 25)", {"method": "heun"}, odd=True),
    Line("Heun, time-uniform (5, 7, 9, 15, 25)", {"method": "heun", "grid": "time_uniform"}, odd=True),
    Line("2M, dynamic threshold", {"method": "dpmpp", "threshold": "dynamic"}),
)


def main(arguments: argparse.Namespace) -> None:
    """Draw and judge the same seeds with every solver."""
    config = demo_config() if arguments.config is None else load_config(RunConfig, arguments.config)
    judge = Judge(config.data)
    pipeline = Pipeline.from_bundle(arguments.bundle, backend=arguments.backend, batch_size=BATCH)
    count = arguments.samples
    labels = np.arange(count) % 10

    def drawn(**choices: Any) -> tuple[Samples, float]:
        start = time.perf_counter()
        samples = pipeline(labels.tolist(), range(count), batch_size=BATCH, **choices)
        return samples, (time.perf_counter() - start) / count

    total = len(arguments.scale) * len(LINES) * len(EVALUATIONS)
    with progress("solvers", total) as advance:
        for scale in arguments.scale:
            reference, _ = drawn(scale=scale, **CONVERGED)
            verdict = judge(reference.images, labels)
            print(
                f"\n| scale {scale:g}, evaluations | "
                + " | ".join(map(str, EVALUATIONS))
                + " | ms an image at 10 |"
            )
            print("|---" * (len(EVALUATIONS) + 2) + "|")
            shown: list[np.ndarray] = []
            for line in LINES:
                cells, seconds = [], 0.0
                for evaluations in EVALUATIONS:
                    samples, spent = drawn(scale=scale, **line.at(evaluations))
                    found = judge(samples.images, labels)
                    cell = f"{100 * found.accuracy:.1f} / {found.diversity:.2f}"
                    if not line.stochastic:
                        cell += f" / {_distance(samples, reference):.1f}"
                    cells.append(cell)
                    seconds = spent if evaluations == 10 else seconds
                    if evaluations == 10:
                        shown.append(samples.images[:10])
                    advance(1, f"{line.name}, {evaluations}")
                print(f"| {line.name} | " + " | ".join(cells) + f" | {1000 * seconds:.1f} |", flush=True)
            print(
                f"| converged | {100 * verdict.accuracy:.1f} / {verdict.diversity:.2f}"
                + " |" * (len(EVALUATIONS) + 1)
            )
            longest, _ = drawn(scale=scale, method="ddpm", steps=250)
            verdict = judge(longest.images, labels)
            print(
                f"| DDPM, 250 steps | {100 * verdict.accuracy:.1f} / {verdict.diversity:.2f}"
                + " |" * (len(EVALUATIONS) + 1)
            )
            if arguments.grid is not None:
                rows = np.concatenate([*shown, reference.images[:10]])
                save_grid(rows, arguments.grid.with_stem(f"{arguments.grid.stem}-scale{scale:g}"), columns=10)


def _distance(samples: Samples, reference: Samples) -> float:
    """Root mean square difference in grey levels of 255."""
    difference = np.clip(samples.x, -1, 1) - np.clip(reference.x, -1, 1)
    return float(127.5 * np.sqrt(np.mean(np.square(difference, dtype=np.float64))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="a guided bundle of ten classes")
    parser.add_argument(
        "--config", type=Path, help="training file with the data; the demo's digits if left out"
    )
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--scale", type=float, action="append", help="may be repeated; 2 and 4 if left out")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--grid", type=Path, help="write pictures of 10 evaluations, a row each solver")
    given = parser.parse_args()
    given.scale = given.scale or [2.0, 4.0]
    try:
        main(given)
    except AdmtrtError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
