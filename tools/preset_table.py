"""Export every published model at its real size, with generated weights, and print a table of what it takes.

    python tools/preset_table.py ROWS.jsonl [PRESET ...] > table.md

A model is generated, exported for CPUs, exported for engines and built in processes of their own, so that
each peak of memory is that stage's alone. Engines are fp32 and built by TensorRT-RTX for one compute
capability, which needs no GPU. ``ROWS.jsonl`` takes a line for each model as soon as it is done, and what
stands there is not measured again: a run that was cut off goes on. Models of the same graphs share a row.
Without names, every preset is measured: minutes, up to 9 GB of memory and of temporary disk space for each.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from admtrt.config import ClassifierConfig
from admtrt.contract import classifier_gradient_spec, unet_spec
from admtrt.files import atomic_file
from admtrt.presets import PRESETS

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx_ir as ir

    from admtrt.contract import GraphName, GraphSpec

TARGET = 89
"""The compute capability that engines are built for: that of the GeForce RTX 40 series."""

Measured = dict[str, float]
COLUMNS = (
    "preset", "parameters", "weights MiB", "nodes", "export s", "peak GiB", "peak / weights",
    "engine nodes", "build s", "build peak GiB", "engine MiB",
)  # fmt: skip
_MIB, _GIB = 2**20, 2**30


# --- the stages, each in a process of its own -------------------------------------------------------------


def generate(name: str, folder: Path) -> Measured:
    """A checkpoint of the preset's shape."""
    from admtrt.models.checkpoint import build_network, checkpoint_config_from_preset, save_checkpoint
    from admtrt.models.generated import generate_weights

    config = checkpoint_config_from_preset(name)
    network = build_network(config)
    generate_weights(network)
    save_checkpoint(folder / "checkpoint.safetensors", network.state_dict(), config)
    return {"weight_bytes": sum(parameter.nbytes for parameter in network.parameters())}


def export(name: str, folder: Path) -> Measured:
    """The graph for CPUs, written and checked as a bundle's graphs are."""
    from admtrt.export.cpu_form import cpu_form

    start = time.perf_counter()
    model = cpu_form(_graph(name, folder, for_engines=False))
    nodes = _write(model, name, folder / "cpu" / "graph.onnx")
    return {"nodes": nodes, "export_s": time.perf_counter() - start, "export_peak": _peak()}


def engine_export(name: str, folder: Path) -> Measured:
    """The fp32 graph for engines."""
    from admtrt.export.engine_form import engine_form

    start = time.perf_counter()
    model = engine_form(_graph(name, folder, for_engines=True))
    nodes = _write(model, name, folder / "engine" / "graph.onnx")
    return {
        "engine_nodes": nodes,
        "engine_export_s": time.perf_counter() - start,
        "engine_export_peak": _peak(),
    }


def build(name: str, folder: Path) -> Measured:
    """An engine for batch 1 to 4 of that graph."""
    from admtrt.runtime.engines.builder import build_plan
    from admtrt.runtime.engines.library import find_library
    from admtrt.runtime.engines.options import BatchProfile, BuildOptions
    from admtrt.runtime.engines.sources import GraphSource

    graph, spec = _contract(name)
    path = folder / "engine" / "graph.onnx"
    source = GraphSource(graph, "fp32", path=path, spec=spec, digest="", engine_form=True)
    options = BuildOptions(profiles=(BatchProfile(smallest=1, best=1, largest=4),), targets=(TARGET,))
    built = build_plan(find_library("rtx"), source, options)
    return {"build_s": built.seconds, "build_peak": _peak(), "plan_bytes": len(built.plan)}


STAGES = {"generate": generate, "export": export, "engine_export": engine_export, "build": build}


def _graph(name: str, folder: Path, *, for_engines: bool) -> ir.Model:
    from admtrt.export.graphs import classifier_gradient_graph, unet_graph
    from admtrt.models.checkpoint import load_network
    from admtrt.models.classifier import Classifier

    module = load_network(folder / "checkpoint.safetensors", kind=PRESETS[name].kind).module
    if isinstance(module, Classifier):
        return classifier_gradient_graph(module, conv_backward="transposed" if for_engines else "flipped")
    return unet_graph(module)


def _write(model: ir.Model, name: str, path: Path) -> int:
    """Write and check a graph; the number of its nodes."""
    from admtrt.export.check import check_graph
    from admtrt.export.graphs import EXAMPLE_BATCH
    from admtrt.export.write import write_graph

    write_graph(model, path)
    check_graph(path, _contract(name)[1], example_batch=EXAMPLE_BATCH)
    return len(model.graph)


def _contract(name: str) -> tuple[GraphName, GraphSpec]:
    network = PRESETS[name].network
    if isinstance(network, ClassifierConfig):
        return "classifier_gradient", classifier_gradient_spec(network)
    return "unet", unet_spec(network)


def _peak() -> int:
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- the run ----------------------------------------------------------------------------------------------


def measure(name: str) -> Measured:
    """Run the stages of one preset."""
    found: Measured = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            print(f"{name}: {stage}", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--stage", stage, name, folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found |= json.loads(done.stdout.splitlines()[-1])
    return found


def of_same_graphs(name: str) -> list[str]:
    """The presets whose graphs are this one's: dropout, which no graph has, may differ."""
    kind, network = PRESETS[name].kind, PRESETS[name].network
    return [
        other.name
        for other in PRESETS.values()
        if other.kind == kind and other.network.model_copy(update={"dropout": network.dropout}) == network
    ]


def read_rows(path: Path) -> dict[str, Measured]:
    """Measurements so far, by the first preset of each row."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["preset"]: row["measured"] for row in map(json.loads, lines)}


def write_rows(rows: dict[str, Measured], path: Path) -> None:
    """Replace the file in one piece."""
    lines = (json.dumps({"preset": name, "measured": measured}) for name, measured in rows.items())
    with atomic_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines))


def table(rows: dict[str, Measured], names: Iterable[str]) -> str:
    """Markdown, in the order of the presets."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for name in names:
        found = rows[name]
        cells = (
            ", ".join(of_same_graphs(name)),
            f"{found['weight_bytes'] / 4e6:.0f} M",
            f"{found['weight_bytes'] / _MIB:,.0f}",
            f"{found['nodes']:,}",
            f"{found['export_s']:.0f}",
            f"{found['export_peak'] / _GIB:.1f}",
            f"{found['export_peak'] / found['weight_bytes']:.1f}",
            f"{found['engine_nodes']:,}",
            f"{found['build_s']:.0f}",
            f"{found['build_peak'] / _GIB:.1f}",
            f"{found['plan_bytes'] / _MIB:,.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing and print the table; or, with ``--stage``, be one of its processes."""
    if sys.argv[1:2] == ["--stage"]:
        _, _, stage, name, folder = sys.argv
        print(json.dumps(STAGES[stage](name, Path(folder))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="JSON lines; made, or continued")
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="default: every one")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.presets if name not in PRESETS]
    if unknown:
        parser.error(f"there is no preset {unknown[0]!r}; the presets are {', '.join(PRESETS)}")
    names = dict.fromkeys(of_same_graphs(name)[0] for name in arguments.presets or PRESETS)
    rows = read_rows(arguments.rows)
    for name in names:
        if name not in rows:
            rows[name] = measure(name)
            write_rows(rows, arguments.rows)
    print(table(rows, names))


if __name__ == "__main__":
    main()
