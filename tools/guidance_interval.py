"""Class accuracy and diversity of the demo's digits, guided at some noise levels only.

admtrt demo --out OUT
python tools/guidance_interval.py OUT > table.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from admtrt.demo.judge import Judge
from admtrt.demo.run import SAMPLES, demo_config
from admtrt.errors import AdmtrtError
from admtrt.runtime.pipeline import Pipeline
from admtrt.schedule.table import UPDATE, sampling_schedule

SAMPLERS = ("ddim25", "50")
SCALES = (1.0, 2.0, 4.0, 8.0)
INTERVALS = (None, (0.0, 0.3), (0.3, 3.0), (0.3, 1e6), (3.0, 1e6))
BATCH = 100
GUIDED = [UPDATE.index("guidance"), UPDATE.index("x0_shift")]


def main(out: Path) -> None:
    """Draw and judge the same seeds under every choice."""
    judge = Judge(demo_config().data)
    pipeline = Pipeline.from_bundle(out / "bundle", backend="auto", batch_size=BATCH)
    labels = np.arange(SAMPLES) % 10
    print("| sampler | scale | guided at sigma | guided steps | judged their class | diversity |")
    print("|---|---|---|---|---|---|")
    for steps in SAMPLERS:
        for scale in SCALES:
            for interval in INTERVALS:
                sampler = pipeline.sampler(steps=steps, scale=scale, guidance_interval=interval)
                schedule = sampling_schedule(pipeline.bundle.manifest.diffusion, sampler)
                samples = pipeline(
                    labels.tolist(),
                    range(SAMPLES),
                    steps=steps,
                    scale=scale,
                    guidance_interval=interval,
                    batch_size=BATCH,
                )
                verdict = judge(samples.images, labels)
                guided = schedule.coefficients[:, GUIDED].any(axis=1).sum()
                cells = [
                    f"{sampler.method.upper()}, {len(schedule)} steps",
                    f"{scale:g}",
                    _shown(interval),
                    str(guided),
                    f"{verdict.accuracy:.1%}",
                    f"{verdict.diversity:.2f}",
                ]
                print("| " + " | ".join(cells) + " |", flush=True)


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
