"""Compare settings of the CPU backends on the networks of a bundle: numbers of docs/backends.md.

python tools/cpu_settings.py BUNDLE --batch 4 --repeat 15    # OpenVINO: a batch in two parts, side by side
python tools/cpu_settings.py BUNDLE --onnxruntime            # ONNX Runtime: memory and time, batch 1
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from admtrt.bench.remote import peak_memory
from admtrt.bundle import Bundle
from admtrt.contract import GraphName, GraphSpec, is_network
from admtrt.errors import AdmtrtError
from admtrt.runtime.backends.onnxruntime import import_onnxruntime
from admtrt.runtime.backends.openvino import import_openvino
from admtrt.runtime.backends.openvino_passes import normalise_by_channel, separate_weights

SETTINGS = ("default", "memory pattern", "no prepacking", "no arena", "layouts not blocked")
THREADS = 2


def networks_of(bundle: Bundle) -> list[GraphName]:
    """The UNet, and the gradients of the bundle."""
    return [name for name in bundle.manifest.sampled_graphs if is_network(name)]


def inputs_of(spec: GraphSpec, batch: int) -> dict[str, np.ndarray]:
    """Noise for x, one timestep and class for all."""
    rng = np.random.default_rng(0)
    made = {tensor.name: rng.standard_normal(tensor.sized(batch), np.float32) for tensor in spec.inputs}
    if "y" in made:
        made["y"] = np.zeros(batch, np.int64)
    return made | {"t": np.full(batch, 500, np.float32)}


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def divide(bundle: Bundle, batch: int, repeat: int) -> None:
    """Print how much faster each graph is in two parts, a thread each, than whole; runs take turns."""
    openvino = import_openvino()
    for name in networks_of(bundle):
        spec = bundle.manifest.graphs[name].spec
        runs = []
        for parts in (1, 2):
            model = openvino.Core().read_model(str(bundle.graph_path(name)))
            separate_weights(model)
            model.reshape({tensor.name: list(tensor.sized(batch // parts)) for tensor in spec.inputs})
            normalise_by_channel(model)
            settings = {
                "INFERENCE_PRECISION_HINT": "f32",
                "ENABLE_CPU_PINNING": False,
                "INFERENCE_NUM_THREADS": THREADS,
                "NUM_STREAMS": parts,
            }
            compiled = openvino.Core().compile_model(model, "CPU", settings)
            requests = [compiled.create_infer_request() for _ in range(parts)]
            feeds = [inputs_of(spec, batch // parts) for _ in range(parts)]

            def run(requests: Any = requests, feeds: Any = feeds) -> None:
                for request, given in zip(requests, feeds, strict=True):
                    request.start_async(given, share_inputs=True)
                for request in requests:
                    request.wait()

            runs.append(run)
        times = [[seconds(run) for run in runs] for _ in range(repeat + 2)]
        whole, divided = np.median(times[2:], axis=0)
        print(f"{name}, batch {batch}: {whole:.4f} s, in two parts {divided:.4f} s, {whole / divided:.2f}x")


def measure_onnxruntime(bundle: Bundle, setting: str) -> None:
    """Print what a setting costs: peak memory after all networks ran, and their medians."""
    ort = import_onnxruntime(extra="cpu", purpose="Its settings")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if setting == "no prepacking":
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_mem_pattern = setting == "memory pattern"
    options.enable_cpu_mem_arena = setting != "no arena"
    if setting == "layouts not blocked":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    found = []
    names = networks_of(bundle)
    sessions = [ort.InferenceSession(str(bundle.graph_path(name)), options) for name in names]
    for name, session in zip(names, sessions, strict=True):
        given = inputs_of(bundle.manifest.graphs[name].spec, 1)
        times = [seconds(lambda s=session, g=given: s.run(None, g)) for _ in range(5)]
        found.append(f"{name} {np.median(times[1:]):.2f} s")
    print(f"{setting}: {peak_memory() / 2**20:.0f} MiB, {', '.join(found)}")


def main() -> None:
    """Parse the command line; a user's fault ends with exit code 2 and its message."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, default=4, help="even")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--onnxruntime", action="store_true", help="its settings, a process for each")
    parser.add_argument("--setting", choices=SETTINGS, help="of ONNX Runtime, in this process")
    given = parser.parse_args()
    if given.batch < 2 or given.batch % 2 or given.repeat < 1:
        parser.error("--batch must be even, and --repeat at least 1")
    try:
        bundle = Bundle.open(given.bundle)
    except AdmtrtError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    if bundle.manifest.network.low_res_size is not None:
        parser.error("the bundle is an upsampler's")
    if given.setting is not None:
        measure_onnxruntime(bundle, given.setting)
    elif given.onnxruntime:
        for setting in SETTINGS:
            subprocess.run([sys.executable, __file__, str(given.bundle), "--setting", setting], check=True)
    else:
        divide(bundle, given.batch, given.repeat)


if __name__ == "__main__":
    main()
