"""Try int8: a bundle's UNet statically quantised, its speed, and its effect on the images.

    python tools/explore_int8.py fashion.bundle --images 64

Weights per channel and activations of convolutions, calibrated on the inputs that real DDIM trajectories give
the network. Every convolution is first quantised alone; those that disturb the output most stay float32.
Prints one line for each share of convolutions that is kept. An exploration: nothing else uses it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from admtrt.errors import AdmtrtError, RequestError
from admtrt.runtime.backends.onnxruntime import OnnxRuntimeDenoiser
from admtrt.runtime.pipeline import Pipeline

STEPS = "ddim25"
KEPT = (1.0, 0.5, 0.25, 0.1, 0.0)
CALIBRATION_IMAGES = 8


class Recorder(OnnxRuntimeDenoiser):
    """ONNX Runtime, which remembers what the UNet was given, or runs another UNet in its place."""

    calls: list[dict[str, Any]]
    other: ort.InferenceSession | None = None

    def run(self, graph, feeds):  # type: ignore[no-untyped-def]
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        if graph != "unet":
            return super().run(graph, feeds)
        self.calls.append(feeds)
        if self.other is not None:
            return {"out": self.other.run(["out"], feeds)[0]}
        return super().run(graph, feeds)


class Calls(CalibrationDataReader):
    """Recorded inputs, in turn."""

    def __init__(self, calls: list[dict[str, Any]]) -> None:
        self._calls = iter(calls)

    def get_next(self) -> dict[str, Any] | None:
        """The next call's inputs."""
        return next(self._calls, None)


def session(path: Path) -> ort.InferenceSession:
    """A session on every core."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def quantised(
    source: Path, target: Path, calls: list[dict[str, Any]], nodes: list[str]
) -> ort.InferenceSession:
    """The UNet with these convolutions in int8."""
    quantize_static(
        str(source), str(target), Calls(calls), quant_format=QuantFormat.QDQ, op_types_to_quantize=["Conv"],
        per_channel=True, weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
        nodes_to_quantize=nodes,
    )  # fmt: skip
    return session(target)


def named_convolutions(source: Path, target: Path) -> list[str]:
    """Write the graph with a name for every convolution; the names."""
    model = onnx.load(str(source))
    names = []
    for index, node in enumerate(model.graph.node):
        if node.op_type == "Conv":
            node.name = f"conv_{index}"
            names.append(node.name)
    onnx.save(model, str(target))
    return names


def seconds(run: Any, repeat: int = 5) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def psnr(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Of each uint8 image, in dB; 99 where they are equal."""
    error = ((images.astype(float) - reference) ** 2).mean(axis=(1, 2, 3))
    return np.minimum(10 * np.log10(255**2 / np.maximum(error, 1e-12)), 99.0)


def main() -> None:
    """Quantise, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=64)
    arguments = parser.parse_args()
    try:
        pipeline = Pipeline.from_bundle(arguments.bundle)
        if pipeline.bundle.manifest.network.low_res_size is not None:
            raise RequestError("the bundle is an upsampler's", hint="Give one that draws from noise alone.")
    except AdmtrtError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    manifest = pipeline.bundle.manifest
    recorder = Recorder(pipeline.bundle)
    recorder.calls = []
    pipeline = Pipeline(pipeline.bundle, recorder)
    classes = manifest.num_classes

    def draw(count: int, first: int) -> np.ndarray:
        labels = None if classes is None else [index % classes for index in range(count)]
        return pipeline(labels, range(first, first + count), steps=STEPS, scale=0.0).images

    draw(CALIBRATION_IMAGES, 10_000)  # other seeds than those that are judged
    calls, recorder.calls = recorder.calls, []
    reference = draw(arguments.images, 0)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "unet.onnx"
        names = named_convolutions(pipeline.bundle.graph_path("unet"), source)
        exact = session(source)
        probe = calls[len(calls) // 2]
        expected = exact.run(["out"], probe)[0]
        scale = np.abs(expected).max()
        disturbance = {}
        for name in names:
            alone = quantised(source, Path(folder) / "alone.onnx", calls[::8], [name])
            disturbance[name] = float(np.abs(alone.run(["out"], probe)[0] - expected).max() / scale)
        ranked = sorted(names, key=lambda name: -disturbance[name])
        print(f"{len(names)} convolutions; alone in int8 they disturb the output by", end=" ")
        print(f"{disturbance[ranked[-1]]:.1e} to {disturbance[ranked[0]]:.1e} of its largest value")
        print("| kept in float32 | UNet, relative speed | PSNR, mean | minimum |\n|---|---|---|---|")
        for share in KEPT:
            chosen = ranked[round(share * len(names)) :]
            recorder.other = (
                quantised(source, Path(folder) / "int8.onnx", calls[::2], chosen) if chosen else exact
            )
            ratio = seconds(lambda: exact.run(["out"], probe)) / seconds(
                lambda: recorder.other.run(["out"], probe)
            )
            values = psnr(draw(arguments.images, 0), reference)
            print(
                f"| {share:.0%} | {ratio:.2f}x | {values.mean():.1f} dB | {values.min():.1f} dB |", flush=True
            )


if __name__ == "__main__":
    main()
