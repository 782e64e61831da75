"""Compare solvers: class accuracy, diversity and distance from the converged result, by evaluations.

admtrt demo --out OUT
python tools/solver_table.py OUT/bundle --picture solvers.png > table.md
python tools/solver_table.py fashion.bundle --config configs/fashion-mnist.toml --samples 100 --precision bf16

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
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from admtrt.bundle import Bundle
from admtrt.config_files import load_config
from admtrt.console import progress_bar
from admtrt.demo.judge import Judge
from admtrt.demo.run import demo_config
from admtrt.errors import AdmtrtError
from admtrt.files import atomic_file
from admtrt.images import to_pillow
from admtrt.run_config import RunConfig
from admtrt.runtime.backends.choice import BackendChoice
from admtrt.runtime.pipeline import Pipeline, Samples

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Images = NDArray[np.uint8]

EVALUATIONS = (5, 8, 10, 15, 25)
ODD = {8: 7, 10: 9}
"""Evaluations of a solver that takes odd numbers alone."""
CONVERGED: dict[str, Any] = {"method": "dpmpp", "steps": 100}
BATCH = 100
TIMED = 10  # evaluations whose seconds are shown
SHOWN, ACROSS = 4, 2
"""Samples in each cell of the picture, and in each of their rows."""
MARGIN, HEADER, GAP, SEAM, EDGE = 34, 40, 10, 2, 48  # pixels
PICTURED = {
    "DDPM": ("DDPM",),
    "DDIM": ("DDIM",),
    "Heun, Karras (5, 7, 9, 15, 25)": ("Heun", "(5, 7, 9, 15, 25)"),
    "DPM-Solver++(2M)": ("2M",),
    "2M, logSNR": ("2M", "logSNR"),
    "UniPC-2": ("UniPC-2",),
    "SDE-2M": ("SDE-2M",),
    "SA-2": ("SA-2",),
}
"""Columns of the picture, with the lines of their heads."""


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
    Line("SA-2", {"method": "sa"}, stochastic=True),
    Line("SA-3", {"method": "sa", "order": 3}, stochastic=True),
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
    choice = BackendChoice(arguments.backend, precision=arguments.precision, batch_size=BATCH)
    pipeline = Pipeline.open(Bundle.open(arguments.bundle), choice)
    count = arguments.samples
    labels = np.arange(count) % 10
    lines = [line for line in LINES if not arguments.only or line.name in arguments.only]

    def drawn(**choices: Any) -> tuple[Samples, float]:
        start = time.perf_counter()
        samples = pipeline(labels.tolist(), range(count), batch_size=BATCH, **choices)
        return samples, (time.perf_counter() - start) / count

    with progress_bar("solvers", len(arguments.scale) * len(lines) * len(EVALUATIONS)) as progress:
        for scale in arguments.scale:
            reference, _ = drawn(scale=scale, **CONVERGED)
            heads = [f"scale {scale:g}, evaluations", *map(str, EVALUATIONS), "ms an image at 10"]
            print(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
            shown: dict[str, list[Images]] = {}
            for line in lines:
                cells, seconds = [], 0.0
                for evaluations in EVALUATIONS:
                    samples, spent = drawn(scale=scale, **line.at(evaluations))
                    cell = _cell(judge, samples, labels)
                    if not line.stochastic:
                        cell += f" / {_distance(samples, reference):.1f}"
                    cells.append(cell)
                    seconds = spent if evaluations == TIMED else seconds
                    shown.setdefault(line.name, []).append(samples.images[:SHOWN])
                    progress(1, f"{line.name}, {evaluations}")
                print(f"| {line.name} | {' | '.join(cells)} | {1000 * seconds:.1f} |", flush=True)
            longest, _ = drawn(scale=scale, method="ddpm", steps=250)
            empty = " |" * (len(EVALUATIONS) + 1)
            print(f"| converged | {_cell(judge, reference, labels)}{empty}")
            print(f"| DDPM, 250 steps | {_cell(judge, longest, labels)}{empty}", flush=True)
            if arguments.picture is not None:
                several = len(arguments.scale) > 1
                path: Path = arguments.picture
                path = path.with_stem(f"{path.stem}-scale{scale:g}") if several else path
                save_picture(path, shown, reference.images[:SHOWN])


def save_picture(path: Path, shown: Mapping[str, Sequence[Images]], converged: Images) -> None:
    """Columns by solver, rows by evaluations, each cell the same seeds; the last column is converged."""
    edge = max(1, EDGE // converged.shape[1]) * converged.shape[1]
    block = (edge + SEAM) * ACROSS - SEAM
    columns = {name: list(cells) for name, cells in shown.items() if name in PICTURED}
    columns["converged"] = [converged] * len(EVALUATIONS)
    size = (MARGIN + len(columns) * (block + GAP), HEADER + len(EVALUATIONS) * (block + GAP))
    sheet = Image.new("L", size, 255)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, evaluations in enumerate(EVALUATIONS):
        middle = HEADER + row * (block + GAP) + block // 2
        draw.text((MARGIN - GAP, middle), str(evaluations), fill=0, font=font, anchor="rm")
    for column, (name, cells) in enumerate(columns.items()):
        left = MARGIN + column * (block + GAP)
        for line, words in enumerate(PICTURED.get(name, (name,))):
            draw.text((left + block // 2, 10 + 15 * line), words, fill=0, font=font, anchor="mm")
        for row, images in enumerate(cells):
            top = HEADER + row * (block + GAP)
            for place, pixels in enumerate(images):
                tile = to_pillow(pixels).convert("L").resize((edge, edge), Image.Resampling.NEAREST)
                across, down = place % ACROSS, place // ACROSS
                sheet.paste(tile, (left + across * (edge + SEAM), top + down * (edge + SEAM)))
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def _cell(judge: Judge, samples: Samples, labels: NDArray[np.int64]) -> str:
    found = judge(samples.images, labels)
    return f"{100 * found.accuracy:.1f} / {found.diversity:.2f}"


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
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--only", action="append", help="a line of the table alone; may be repeated")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="columns by solver, rows by evaluations"
    )
    given = parser.parse_args()
    given.scale = given.scale or [2.0, 4.0]
    try:
        main(given)
    except AdmtrtError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
