"""Class accuracy, diversity and distances of the demo's digits, guided at some noise levels only.

admtrt demo --out OUT
python tools/guidance_interval.py OUT > table.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from admtrt.bundle import Bundle
from admtrt.demo.judge import Judge
from admtrt.demo.run import demo_config, sweep_digits
from admtrt.errors import AdmtrtError
from admtrt.evaluate.sweep import points
from admtrt.schedule.table import UPDATE, sampling_schedule

if TYPE_CHECKING:
    from admtrt.demo.run import SweepPoint

SAMPLERS = {"ddim": "ddim25", "ddpm": "50"}
SCALES = (1.0, 2.0, 4.0, 8.0)
INTERVALS = (None, (0.0, 0.3), (0.3, 3.0), (0.3, 1e6), (3.0, 1e6))
GUIDED = [UPDATE.index("guidance"), UPDATE.index("x0_shift")]


def main(out: Path) -> None:
    """Draw and judge the same seeds under every choice."""
    bundle = Bundle.open(out / "bundle")
    print("| sampler | scale | guided at sigma | guided steps | judged their class | diversity | FD | KID |")
    print("|---|---|---|---|---|---|---|---|")

    def show(point: SweepPoint, _: object) -> None:
        sampler = point.row.sampler
        schedule = sampling_schedule(bundle.manifest.diffusion, sampler)
        cells = [
            f"{sampler.method.upper()}, {len(schedule)} steps",
            f"{sampler.scale:g}",
            _shown(sampler.guidance_interval),
            str(schedule.coefficients[:, GUIDED].any(axis=1).sum()),
            f"{point.verdict.accuracy:.1%}",
            f"{point.verdict.diversity:.2f}",
            *(f"{value.value:.3g}" for value in point.distances.values()),
        ]
        print("| " + " | ".join(cells) + " |", flush=True)

    chosen = [
        point
        for method, steps in SAMPLERS.items()
        for point in points([method], [steps], SCALES, ["fp32"], INTERVALS)
    ]
    sweep_digits(bundle, chosen, out, Judge(demo_config().data), backend="auto", seen=show)


def _shown(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "all"
    low, high = interval
    return f"above {low:g}" if high >= 1e6 else f"{low:g} to {high:g}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder that `admtrt demo` made")
    try:
        main(parser.parse_args().out)
    except AdmtrtError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
