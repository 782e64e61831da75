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
from admtrt.contract import PRECISIONS
from admtrt.errors import EngineError, UserError
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.models.checkpoint import load_network
from admtrt.runtime.backends.choice import BackendChoice
from admtrt.runtime.backends.onnxruntime import OnnxRuntimeDenoiser
from admtrt.runtime.backends.providers import PROVIDERS
from admtrt.runtime.backends.registry import BACKENDS
from admtrt.runtime.backends.tensorrt import TensorRTDenoiser
from admtrt.runtime.cuda import Graph, Stream
from admtrt.runtime.engines.build import PlanBuilder
from admtrt.runtime.engines.device import query_driver
from admtrt.runtime.engines.library import find_library, lean_runtime
from admtrt.runtime.engines.options import BatchProfile, BuildOptions
from admtrt.runtime.engines.plans import PlanStore
from admtrt.runtime.engines.sources import graph_source
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.trt.layers import plan_layers
from admtrt.verify.report import sample_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from admtrt.contract import Precision
    from admtrt.runtime.drawn import Samples
    from admtrt.runtime.engines.library import Flavor, Library
    from admtrt.runtime.sampler import Denoiser

PRESET = "64x64_diffusion"
REPORT = "build/gpu.md"
# Of an image's range of 2: fp32 differs by the order of sums; the others by their 11 and 8 bits of mantissa.
TOLERANCES = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 2e-1}
# Of one network's output at ImageNet-64 size, with random weights; docs/benchmarks.md has what CPUs reach.
NETWORK_TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1.5e-1}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(query_driver().gpu is None, reason=f"no GPU: {query_driver().fault}"),
]


def tolerance(table: dict[str, float], backend: str, precision: Precision) -> float:
    """Providers whose fp32 products are rounded to TF32, as wide as fp16's, are held to the bars of fp16."""
    rounded = backend in PROVIDERS and not BACKENDS[backend].exact
    return table["fp16" if rounded and precision == "fp32" else precision]


def fault_of(flavor: Flavor) -> str:
    """The reason why a library cannot run here; empty if it can."""
    gpu = query_driver().gpu
    assert gpu is not None
    try:
        library = find_library(flavor)
    except UserError as error:
        return error.message
    runs = not library.targets or gpu.compute_capability in library.targets
    return "" if runs else f"{library} does not run on {gpu}"


def build(
    bundle: Bundle,
    precision: Precision,
    library: Library,
    store: PlanStore,
    *profiles: str,
    timing_cache: Path | None = None,
    **given: Any,
) -> None:
    builder = PlanBuilder(library, query_driver().gpu, store, timing_cache=timing_cache)
    options = BuildOptions(profiles=tuple(BatchProfile.parse(profile) for profile in profiles), **given)
    for graph in bundle.manifest.graphs:
        builder.make(graph_source(bundle, graph, precision), options)


INTERVAL = {"steps": 10, "guidance_interval": (0.5, 20.0)}  # guided and unguided steps, each captured


def drawn(bundle: Bundle, denoiser: Denoiser, labels: Sequence[int], **options: Any) -> Samples:
    return Pipeline(bundle, denoiser)(labels, **(INTERVAL | options))


def worst_error(found: Samples, bundle: Bundle, labels: Sequence[int], **options: Any) -> float:
    """Of x after the whole trajectory, against ONNX Runtime on the CPU."""
    expected = drawn(bundle, OnnxRuntimeDenoiser(bundle), labels, **options)
    return float(sample_errors(found.x, expected.x).max())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("flavor", ["tensorrt", "rtx"])
def test_parity_graphs_and_padding(
    flavor: Flavor, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault := fault_of(flavor):
        pytest.skip(fault)
    library, bundle = find_library(flavor), typed_bundle()
    build(bundle, precision, library, PlanStore(tmp_path), "2:4:8")
    labels, options = [0, 1, 2, 1, 0], {"batch_size": 4}  # batches of 4 and of 1, padded to 2
    launches, launch = [], Graph.launch

    def counted(graph: Graph, stream: Stream) -> None:
        launches.append(graph)
        launch(graph, stream)

    monkeypatch.setattr(Graph, "launch", counted)
    with TensorRTDenoiser(bundle, precision, plans=tmp_path) as denoiser:
        samples = drawn(bundle, denoiser, labels, **options)
        assert "no CUDA graphs" not in str(denoiser)
    assert worst_error(samples, bundle, labels, **options) <= TOLERANCES[precision]
    if library.flavor == "rtx":
        assert list(tmp_path.glob("*.kernels"))
        return
    assert len(set(map(id, launches))) == 4  # two batch sizes, guided and not

    capture = Stream.capture

    def failing(stream: Stream, enqueue: Callable[[], None]) -> Graph:
        def forbidden() -> None:
            enqueue()
            stream.sync()  # which invalidates the capture, with the other stream in it

        return capture(stream, forbidden)

    monkeypatch.setattr(Stream, "capture", failing)
    with TensorRTDenoiser(bundle, precision, plans=tmp_path) as denoiser:
        plain = drawn(bundle, denoiser, labels, **options)
        assert "no CUDA graphs (" in str(denoiser)
    np.testing.assert_array_equal(plain.x, samples.x)


@pytest.mark.parametrize(
    "options",
    [
        {"profiles": ("4",)},  # whose size the plan may fix
        {"profiles": ("1", "4:4:8")},
        {"strip": True},
        {"refit": True},
        {"hardware_compatible": "same_compute_capability"},
        {"version_compatible": True},
        {"optimization_level": 0, "workspace": 512},
    ],
    ids=str,
)
def test_ways_to_build(options: dict[str, Any], tmp_path: Path) -> None:
    if fault := fault_of("tensorrt"):
        pytest.skip(fault)
    library, bundle = find_library("tensorrt"), typed_bundle()
    if options.get("version_compatible") and lean_runtime(library.version) is None:
        pytest.skip(f"the lean runtime of {library} is not installed")
    given = dict(options)
    profiles = given.pop("profiles", ("1:4:8",))
    cache = tmp_path / "timing.cache"
    build(bundle, "fp16", library, PlanStore(tmp_path), *profiles, timing_cache=cache, **given)
    assert cache.stat().st_size > 0
    with TensorRTDenoiser(bundle, "fp16", plans=tmp_path) as denoiser:
        samples = drawn(bundle, denoiser, [0, 1, 2, 1])
    assert worst_error(samples, bundle, [0, 1, 2, 1]) <= TOLERANCES["fp16"]


@pytest.mark.parametrize("flavor", ["tensorrt", "rtx"])
def test_layers_of_a_plan(flavor: Flavor, tmp_path: Path) -> None:
    if fault := fault_of(flavor):
        pytest.skip(fault)
    bundle, store = typed_bundle(), PlanStore(tmp_path)
    build(bundle, "fp16", find_library(flavor), store, "1:2:4")
    for record in store.records()[0]:
        layers = plan_layers(bundle, store, record)
        assert layers
        assert all(layer.name for layer in layers)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", list(PROVIDERS))
def test_providers_at_several_batch_sizes(backend: str, precision: Precision) -> None:
    chosen = BACKENDS[backend]
    if precision not in chosen.precisions:
        pytest.skip(f"{backend} has no {precision}")
    if not chosen.available():
        pytest.skip(chosen.available().reason)
    bundle, labels = typed_bundle(), [0, 1, 2, 1, 0]
    try:
        denoiser = chosen.open(bundle, BackendChoice(chosen.name, precision))
    except EngineError as error:  # ONNX Runtime lists a provider whose libraries are not there
        if "could not load" not in error.message:
            raise
        pytest.skip(error.message)
    for size in (4, 1, 4, 3):  # a graph of one size must not serve another
        samples = drawn(bundle, denoiser, labels, batch_size=size)
        assert worst_error(samples, bundle, labels) <= tolerance(TOLERANCES, backend, precision), size


def test_a_gpu_that_rtx_does_not_serve_is_named(tmp_path: Path) -> None:
    if "does not run" not in fault_of("rtx"):
        pytest.skip("TensorRT-RTX is not installed, or serves this GPU")
    bundle = typed_bundle()
    build(bundle, "fp32", find_library("rtx"), PlanStore(tmp_path), "1:2:4")  # it is built all the same
    with pytest.raises(EngineError, match=r"TensorRT.* does not run on|no plan of graph"):
        TensorRTDenoiser(bundle, plans=tmp_path)


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
    for measurement in report.measurements:
        for output, error in measurement.errors.items():
            assert error is not None, measurement.row
            bar = tolerance(NETWORK_TOLERANCES, measurement.row.name, measurement.row.precision)
            assert error <= bar, (str(measurement.row), output)
    assert measured >= {EAGER} | ({"tensorrt"} if not all(map(fault_of, flavors)) else set())
