r"""Table of models and losses whose input gradient is exported and compared with float64 autograd.

python -m pip install timm torchvision transformers open_clip_torch diffusers kornia lpips piq \\
    segmentation-models-pytorch monai neuraloperator
git clone https://github.com/openai/guided-diffusion
PYTHONPATH=guided-diffusion python tools/gradient_table.py gradients.json > table.md

Weights are random, with norms and zeros disturbed. A graph is traced at a batch of 2 and right if at batches
of 3, 1 and 5, in the median of five draws of other inputs, its gradient is at most 1e-4 of a sample's largest
value away from autograd in float64, or 4 times as far as PyTorch in float32. The JSON file keeps what is
measured: a second run measures only what is missing. Packages that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gradient_losses import LOSSES
from gradient_measure import measure
from gradient_operators import OPERATORS
from gradient_zoo import MODELS

from admtrt.files import atomic_file

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

CASES = {**LOSSES, **MODELS, **OPERATORS}
ABSENT = "not installed"
PACKAGES = (
    "torch", "onnxruntime", "timm", "torchvision", "transformers", "open_clip_torch", "diffusers", "kornia",
    "lpips", "piq", "segmentation-models-pytorch", "monai", "neuraloperator",
)  # fmt: skip
REASON = 110  # characters of a reason in the table


def measured(name: str, seconds: float, gib: float) -> dict[str, Any]:
    """The row of a case, from a process of its own with limits of time and memory: a crash costs one row."""
    here, there = multiprocessing.Pipe(duplex=False)
    worker = multiprocessing.get_context("fork").Process(target=_work, args=(name, gib, there))
    worker.start()
    there.close()
    row: dict[str, Any]
    try:
        in_time = here.poll(seconds)
        row = here.recv() if in_time else {"outcome": "failed", "reason": f"not ready in {seconds:g} seconds"}
    except EOFError:
        worker.join()
        row = {"outcome": "failed", "reason": f"the process ended with {worker.exitcode}"}
    worker.kill()
    worker.join()
    return row


def _work(name: str, gib: float, answer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (int(gib * 2**30),) * 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # packages greet
    try:
        answer.send(measure(CASES[name]))
    except BaseException as error:
        answer.send({"outcome": "failed", "reason": f"{type(error).__name__}: {error}"})
        raise


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Counts by outcome, versions, and a line for each row."""
    present = {name: rows[name] for name in CASES if name in rows and rows[name]["outcome"] != ABSENT}
    lines = [
        _counts({name: row for name, row in present.items() if name not in OPERATORS}, "models and losses")
    ]
    lines += [_counts({name: row for name, row in present.items() if name in OPERATORS}, "single operators")]
    lines += [", ".join(filter(None, map(_version, PACKAGES))), ""]
    lines += [
        "| case | result | graph, at 3 / 1 / 5 | PyTorch in float32 | nodes | reason |",
        "|---" * 6 + "|",
    ]
    for name, row in present.items():
        distances = row.get("distances", {}).values()
        ours = " / ".join(f"{graph:.0e}" for graph, *_ in distances)
        own = " / ".join(f"{pytorch[0]:.0e}" if pytorch else "-" for _, *pytorch in distances)
        reason = " ".join(row.get("reason", "").split()).replace("|", "\\|")[:REASON]
        lines.append(f"| {name} | {row['outcome']} | {ours} | {own} | {row.get('nodes', '')} | {reason} |")
    return "\n".join(lines)


def _counts(rows: dict[str, dict[str, Any]], what: str) -> str:
    counts = Counter(row["outcome"] for row in rows.values())
    return f"{len(rows)} {what}: " + ", ".join(
        f"{count} {outcome}" for outcome, count in counts.most_common()
    )


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON file of what is measured; it is continued")
    parser.add_argument("--only", nargs="*", default=[""], help="names, or beginnings of names")
    parser.add_argument("--again", nargs="*", default=[], help="outcomes to measure again, or 'all'")
    parser.add_argument("--seconds", type=float, default=900, help="most time of a case")
    parser.add_argument("--memory", type=float, default=12, help="most GiB of address space of a case")
    arguments = parser.parse_args()
    path, chosen = arguments.results, tuple(arguments.only)
    torch.set_num_threads(1)  # a process with threads cannot be forked
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    measure(CASES["op/amax"])  # what is loaded for it need not be loaded in every process
    for name in CASES:
        again = {"all", rows.get(name, {}).get("outcome")} & {*arguments.again, ABSENT}
        if not name.startswith(chosen) or (name in rows and not again):
            continue
        rows[name] = measured(name, arguments.seconds, arguments.memory)
        print(name, rows[name]["outcome"], file=sys.stderr, flush=True)
        with atomic_file(path) as unfinished:
            unfinished.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
