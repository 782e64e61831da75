"""Export every published configuration at its real size, with generated weights, and print a table.

    python tools/preset_table.py [PRESET ...] > table.md

Each preset is generated, exported and built in processes of its own, so that peak memory is the export's
alone. Engines are built by TensorRT-RTX for one compute capability, which needs no GPU. Takes about a minute
and 3 to 6 GB of memory for each preset.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from admtrt.presets import PRESETS

COMPUTE_CAPABILITY = "SM89"
COLUMNS = (
    "preset", "parameters", "nodes", "graph and weights MiB", "export s", "export peak GiB", "peak / weights",
    "engine build s", "engine MiB",
)  # fmt: skip


def generate(name: str, folder: Path) -> dict[str, float]:
    """A checkpoint of the preset's shape."""
    from admtrt.models.checkpoint import build_network, checkpoint_config_from_preset, save_checkpoint
    from admtrt.models.generated import generate_weights

    config = checkpoint_config_from_preset(name)
    network = build_network(config)
    generate_weights(network)
    save_checkpoint(folder / "checkpoint.safetensors", network.state_dict(), config)
    return {"parameters": sum(parameter.numel() for parameter in network.parameters())}


def export(name: str, folder: Path) -> dict[str, float]:
    """The preset's graph, checked as a bundle's graphs are."""
    from admtrt.contract import classifier_gradient_spec, unet_spec
    from admtrt.export.check import check_graph
    from admtrt.export.graphs import EXAMPLE_BATCH, classifier_gradient_graph, unet_graph
    from admtrt.export.write import write_graph
    from admtrt.models.checkpoint import load_network
    from admtrt.models.classifier import Classifier

    start = time.perf_counter()
    module = load_network(folder / "checkpoint.safetensors", kind=PRESETS[name].kind).module
    if isinstance(module, Classifier):
        model, spec = classifier_gradient_graph(module), classifier_gradient_spec(module.config)
    else:
        model, spec = unet_graph(module), unet_spec(module.config)
    file = folder / "graph" / "graph.onnx"
    write_graph(model, file)
    check_graph(file, spec, example_batch=EXAMPLE_BATCH)
    return {
        "nodes": len(list(model.graph)),
        "bytes": sum(part.stat().st_size for part in file.parent.iterdir()),
        "export_s": time.perf_counter() - start,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def build(name: str, folder: Path) -> dict[str, float]:  # noqa: ARG001 - one signature for the stages
    """A TensorRT-RTX engine for batch 1 to 4."""
    import tensorrt_rtx as trt

    start = time.perf_counter()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(folder / "graph" / "graph.onnx")):
        raise SystemExit("\n".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, COMPUTE_CAPABILITY), 0)
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sizes = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, (1, *sizes), (1, *sizes), (4, *sizes))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise SystemExit("the build failed")
    return {"build_s": time.perf_counter() - start, "plan_bytes": plan.nbytes}


def stages(name: str) -> dict[str, float]:
    """Run the three stages of one preset, each in a process of its own."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("generate", "export", "build"):
            command = [sys.executable, __file__, "--stage", stage, name, folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found |= json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: {stage} {found}", file=sys.stderr, flush=True)
    return found


def row(name: str, found: dict[str, float]) -> str:
    """One line of the table."""
    weights = 4 * found["parameters"]
    cells = (
        name,
        f"{found['parameters'] / 1e6:.0f} M",
        f"{found['nodes']:.0f}",
        f"{found['bytes'] / 2**20:.0f}",
        f"{found['export_s']:.0f}",
        f"{found['peak_bytes'] / 2**30:.1f}",
        f"{found['peak_bytes'] / weights:.1f}",
        f"{found['build_s']:.0f}",
        f"{found['plan_bytes'] / 2**20:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str]) -> None:
    """Print the table of the named presets, or of all; or run one stage."""
    if arguments[:1] == ["--stage"]:
        _, stage, name, folder = arguments
        found = {"generate": generate, "export": export, "build": build}[stage](name, Path(folder))
        print(json.dumps(found))
        return
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for name in arguments or PRESETS:
        print(row(name, stages(name)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
