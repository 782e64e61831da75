"""Exported files are the same, byte for byte, on any processor and number of threads."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from decimal import Decimal, localcontext
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from bundles import CLASSIFIER, UNET, network
from onnx import numpy_helper

from admtrt.export.graphs import unet_graph
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.export.write import write_graph
from admtrt.models.layers import embedding_frequencies
from admtrt.models.unet import UNet

COUNT = UNET.model_channels // 2
_SETTINGS = (
    {"OMP_NUM_THREADS": "2"},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
)


def unet_hashes(folder: Path) -> dict[str, str]:
    """Of a tiny UNet's graph and of its time embedding's constants."""
    module = network(UNET).module
    assert isinstance(module, UNet)
    file = folder / "unet.onnx"
    write_graph(unet_graph(module), file)
    return {"graph": sha256(file.read_bytes()).hexdigest(), "frequencies": _hash(_frequencies(file))}


def bundle_hashes(folder: Path) -> dict[str, str]:
    """Of every graph of a bundle with a classifier, in the forms for CPUs and for engines."""
    path = folder / "bundle"
    bundle_from_checkpoints(network(UNET), network(CLASSIFIER), path, engines=("fp16", "bf16"))
    files = sorted(path.rglob("*.onnx"))
    assert len(files) == 9
    return {str(file.relative_to(path)): sha256(file.read_bytes()).hexdigest() for file in files}


def _frequencies(file: Path) -> np.ndarray:
    """The constant that the graph's sines and cosines are taken of, times t."""
    graph = onnx.load(file).graph
    made = {name: node for node in graph.node for name in node.output}
    (cosine,) = (node for node in graph.node if node.op_type == "Cos")
    constants = {tensor.name: tensor for tensor in graph.initializer}
    (name,) = (name for name in made[cosine.input[0]].input if name in constants)
    return numpy_helper.to_array(constants[name]).reshape(-1)


def _hash(values: np.ndarray) -> str:
    return sha256(values.tobytes()).hexdigest()


def _started(function: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Run the function in a new process, because libraries read these variables at start."""
    script = f"import json, pathlib, test_same_bytes as t\nprint(json.dumps(t.{function}(pathlib.Path('.'))))"
    folder.mkdir()
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def _found(process: subprocess.Popen[str]) -> dict[str, str]:
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0
    found: dict[str, str] = json.loads(out.splitlines()[-1])
    return found


def test_threads_and_processor_change_nothing(tmp_path: Path) -> None:
    """This process has one thread."""
    other = _started("unet_hashes", tmp_path / "other", _SETTINGS[0] | _SETTINGS[1])
    here = unet_hashes(tmp_path)
    assert here["frequencies"] == _hash(embedding_frequencies(COUNT).numpy())
    assert _found(other) == here


@pytest.mark.slow
@pytest.mark.parametrize("environment", _SETTINGS, ids=lambda given: "-".join(*given.items()))
def test_whole_bundles_are_the_same(environment: dict[str, str], tmp_path: Path) -> None:
    other = _started("bundle_hashes", tmp_path / "other", environment)
    assert bundle_hashes(tmp_path) == _found(other)


@pytest.mark.parametrize("count", [16, 48, 64, 96, 112, 128])
def test_frequencies_are_rounded_correctly(count: int) -> None:
    """To the float32 nearest to the exact exponential of the original's exponents."""
    found = embedding_frequencies(count).numpy()
    exponents = -math.log(10_000) * torch.arange(count, dtype=torch.float32) / count
    with localcontext() as context:
        context.prec = 60
        exact = [Decimal(exponent).exp() for exponent in exponents.tolist()]
        for value, expected in zip(found, exact, strict=True):
            error = abs(Decimal(float(value)) - expected)
            for neighbour in (np.nextafter(value, np.float32(0)), np.nextafter(value, np.float32(2))):
                assert error <= abs(Decimal(float(neighbour)) - expected)


def test_frequencies_ignore_the_device_and_the_decimal_context() -> None:
    with torch.device("meta"), localcontext() as context:
        context.prec = 3
        found = embedding_frequencies(COUNT)
    assert torch.equal(found, embedding_frequencies(COUNT))
