"""Plans on a real GPU, for whatever libraries are installed: parity, CUDA graphs, and a table of speeds.

The weights are those of the golden recipe. The table is written to ``build/gpu.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typed_bundles import typed_bundle

from admtrt.bench.rows import COMPILED, EAGER, default_rows
from admtrt.bench.run import run_bench
from admtrt.bench.subject import subject_from_preset
from admtrt.bundle import Bundle
from admtrt.errors import EngineError, UserError
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.models.checkpoint import load_network
from admtrt.runtime.backends.onnxruntime import OnnxRuntimeDenoiser
from admtrt.runtime.backends.registry import BACKENDS, PRECISIONS
from admtrt.runtime.backends.tensorrt import TensorRTDenoiser
from admtrt.runtime.cuda import Stream
from admtrt.runtime.engines.build import Workshop
from admtrt.runtime.engines.device import query_driver
from admtrt.runtime.engines.library import find_library
from admtrt.runtime.engines.options import BatchProfile, BuildOptions
from admtrt.runtime.engines.plans import PlanStore
from admtrt.runtime.engines.sources import graph_source
from admtrt.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

    from admtrt.contract import Precision
    from admtrt.runtime.engines.library import Flavor, Library

PRESET = "64x64_diffusion"
REPORT = "build/gpu.md"
# Of an image's range of 2: fp32 differs by the order of sums; the others by their 11 and 8 bits of mantissa.
TOLERANCES = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 2e-1}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(query_driver().gpu is None, reason=f"no GPU: {query_driver().fault}"),
]


def fault_of(flavor: Flavor) -> str:
    """Why a library cannot run here; empty where it can."""
    gpu = query_driver().gpu
    assert gpu is not None
    try:
        library = find_library(flavor)
    except UserError as error:
        return error.message
    runs = not library.targets or gpu.compute_capability in library.targets
    return "" if runs else f"{library} does not run on {gpu}"


def build(bundle: Bundle, precision: Precision, library: Library, store: PlanStore, *profiles: str) -> None:
    workshop = Workshop(library, query_driver().gpu, store)
    options = BuildOptions(profiles=tuple(BatchProfile.parse(profile) for profile in profiles))
    for graph in bundle.manifest.graphs:
        workshop.make(graph_source(bundle, graph, precision), options)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("flavor", ["tensorrt", "rtx"])
def test_parity_graphs_and_padding(
    flavor: Flavor, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault := fault_of(flavor):
        pytest.skip(fault)
    library, bundle = find_library(flavor), typed_bundle()
    build(bundle, precision, library, PlanStore(tmp_path), "2:4:8")
    labels, options = [0, 1, 2, 1, 0], {"steps": 10, "batch_size": 4}  # batches of 4 and of 1, padded to 2
    expected = Pipeline(bundle, OnnxRuntimeDenoiser(bundle))(labels, **options)

    def drawn() -> tuple[Any, str]:
        with TensorRTDenoiser(bundle, precision, cache=tmp_path) as denoiser:
            return Pipeline(bundle, denoiser)(labels, **options), str(denoiser)

    samples, captured = drawn()
    worst = np.abs(samples.x - expected.x).max(axis=(1, 2, 3)) / np.abs(expected.x).max(axis=(1, 2, 3))
    assert worst.max() <= TOLERANCES[precision]
    if library.flavor == "tensorrt":
        assert "one CUDA graph a step" in captured

        def refuse(*_: Any) -> None:
            raise RuntimeError("not here")

        monkeypatch.setattr(Stream, "capture", refuse)
        plain, eager = drawn()
        assert "no CUDA graphs (not here)" in eager
        np.testing.assert_array_equal(plain.x, samples.x)
    else:
        assert list(tmp_path.glob("*.kernels"))


def test_a_gpu_that_rtx_does_not_serve_is_named(tmp_path: Path) -> None:
    if "does not run" not in fault_of("rtx"):
        pytest.skip("TensorRT-RTX is not installed, or serves this GPU")
    bundle = typed_bundle()
    build(bundle, "fp32", find_library("rtx"), PlanStore(tmp_path), "1:2:4")  # it is built all the same
    with pytest.raises(EngineError, match=r"TensorRT.* does not run on|no plan of graph"):
        TensorRTDenoiser(bundle, cache=tmp_path)


def test_speed(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Every backend that works here against PyTorch, on a published model."""
    subject = subject_from_preset(PRESET, tmp_path, None, print)
    assert subject.unet is not None
    assert subject.classifier is not None
    unet = load_network(subject.unet, kind="unet")
    classifier = load_network(subject.classifier, kind="classifier")
    bundle = bundle_from_checkpoints(unet, classifier, subject.bundle, engines=PRECISIONS, overwrite=True)
    flavors: tuple[Flavor, ...] = ("tensorrt", "rtx")
    for flavor in flavors:
        if not fault_of(flavor):
            for precision in PRECISIONS:
                build(bundle, precision, find_library(flavor), PlanStore.of(bundle), "1:1:1", "16:16:16")
    on_gpu = {EAGER, COMPILED, *(name for name, backend in BACKENDS.items() if backend.device == "cuda")}
    rows = [row for row in default_rows("cuda", original=False) if row.name in on_gpu]
    report = run_bench(subject, rows, batches=(1, 16), repeat=5, device="cuda", threads=8)
    path = pytestconfig.rootpath / REPORT
    path.parent.mkdir(exist_ok=True)
    path.write_text(report.markdown(), encoding="utf-8")
    measured = {measurement.row.name for measurement in report.measurements if measurement.step is not None}
    assert measured >= {EAGER} | ({"tensorrt"} if not all(map(fault_of, flavors)) else set())
