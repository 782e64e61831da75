"""OpenVINO: exact in fp32, near in bf16, compiled for each batch size and no more often."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as library
import pytest
from bundles import CLASSIFIER, UNET, exported_bundle, network, pipeline, sham_bundle
from graph_calls import gradient, unet_out

from admtrt.bundle import Bundle
from admtrt.cli import run
from admtrt.config import ClassifierConfig
from admtrt.errors import BundleError, EngineError, MissingDependencyError, RequestError
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.runtime.backends import openvino as backend
from admtrt.runtime.backends.openvino import OpenVinoDenoiser
from admtrt.runtime.machine import available_threads
from admtrt.runtime.pipeline import Pipeline

RNG = np.random.default_rng(1)
X = RNG.standard_normal((3, 1, 8, 8), dtype=np.float32)
T = np.array([900, 30, 500], dtype=np.float32)
Y = np.array([2, 0, 1])
# Sums in another order, relative to the largest value of a sample.
EXACT = 1e-5
# bf16 keeps 8 bits: 4e-3 for each rounding. Measured: 0.013 of the UNet, 0.027 of the gradient.
LOW = 5e-2


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The worst relative error of a sample."""
    axes = tuple(range(1, expected.ndim))
    return float((np.abs(found - expected).max(axes) / np.abs(expected).max(axes)).max())


@pytest.fixture(scope="module")
def denoiser() -> OpenVinoDenoiser:
    return OpenVinoDenoiser(pipeline("guided").bundle, threads=1)


@pytest.fixture(scope="module")
def low() -> OpenVinoDenoiser:
    try:
        return OpenVinoDenoiser(pipeline("guided").bundle, "bf16", threads=1)
    except RequestError as refused:
        pytest.skip(refused.message)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_fp32_is_exact(denoiser: OpenVinoDenoiser, batch: int) -> None:
    expected = pipeline("guided").denoiser
    x, t, y = X[:batch], T[:batch], Y[:batch]
    assert error(unet_out(denoiser, x, t), unet_out(expected, x, t)) < EXACT
    found = gradient(denoiser, x, t, y)
    assert error(found, gradient(expected, x, t, y)) < EXACT


def test_strided_convolutions_and_their_gradients_share_weights(tmp_path: Path) -> None:
    """Which OpenVINO by itself repacks for the one and reads for both."""
    strided = {"channel_mult": (1, 2), "resblock_updown": False, "conv_resample": True}
    guide = network(ClassifierConfig.from_dict(CLASSIFIER.to_dict() | strided))
    path = tmp_path / "strided"
    bundle_from_checkpoints(network(UNET), guide, path)
    expected = gradient(Pipeline.from_bundle(path).denoiser, X, T, Y)
    found = gradient(OpenVinoDenoiser(Bundle.open(path), threads=1), X, T, Y)
    assert error(found, expected) < EXACT


def test_bf16_is_near_and_another_computation(low: OpenVinoDenoiser) -> None:
    expected = pipeline("guided").denoiser
    for found, reference in (
        (unet_out(low, X, T), unet_out(expected, X, T)),
        (gradient(low, X, T, Y), gradient(expected, X, T, Y)),
    ):
        assert 1e-4 < error(found, reference) < LOW


@pytest.mark.parametrize("graph", ["unet", "classifier_gradient"])
def test_bf16_tells_neighbouring_timesteps_apart(low: OpenVinoDenoiser, graph: str) -> None:
    """bf16 has no whole numbers between 896 and 900."""
    x, t, y = np.repeat(X[:1], 4, axis=0), np.arange(896, 900, dtype=np.float32), np.zeros(4, dtype=np.int64)
    exact: Any = pipeline("guided").denoiser
    call, given = (unet_out, (x, t)) if graph == "unet" else (gradient, (x, t, y))
    found, expected = (call(denoiser, *given) for denoiser in (low, exact))
    for row in range(3):
        moved = np.linalg.norm(expected[row + 1] - expected[row])
        assert np.linalg.norm(found[row + 1] - found[row]) == pytest.approx(moved, rel=0.5)
        assert moved > 0


def update_inputs() -> dict[str, np.ndarray]:
    shapes = {"x": 1, "out": 2, "grad": 1, "noise": 1}
    feeds = {
        name: RNG.standard_normal((3, channels, 8, 8), dtype=np.float32) for name, channels in shapes.items()
    }
    return feeds | {"coefficients": np.full((3, 11), 0.3, dtype=np.float32)}


def test_the_update_is_float32_whatever_the_precision(low: OpenVinoDenoiser) -> None:
    feeds = update_inputs()
    found, expected = (each.run("update", feeds) for each in (low, pipeline("guided").denoiser))
    for name in ("x_prev", "pred_x0"):
        assert error(found[name], expected[name]) < EXACT


@pytest.mark.parametrize("name", ["conditional", "upsampler"])
def test_every_kind_of_input(name: str) -> None:
    bundle = pipeline(name).bundle
    given: dict[str, Any] = {"y": np.array([3, 1, 0])}
    if name == "upsampler":
        given = {"low_res": RNG.standard_normal((3, 1, 4, 4), dtype=np.float32)}
    expected = unet_out(pipeline(name).denoiser, X, T, **given)
    assert error(unet_out(OpenVinoDenoiser(bundle, threads=1), X, T, **given), expected) < EXACT


def test_outputs_belong_to_the_caller_and_inputs_stay(denoiser: OpenVinoDenoiser) -> None:
    x = X.copy()
    x.flags.writeable = False
    first = unet_out(denoiser, x, T)
    kept = first.copy()
    unet_out(denoiser, -X, T)
    assert np.array_equal(first, kept)
    assert np.array_equal(x, X)


def test_arrays_that_are_not_contiguous(denoiser: OpenVinoDenoiser) -> None:
    turned = X[:, :, ::-1]
    assert np.array_equal(unet_out(denoiser, turned, T), unet_out(denoiser, turned.copy(), T))


def test_batch_sizes_are_compiled_once_and_the_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = OpenVinoDenoiser(pipeline("guided").bundle, threads=1, graphs=("unet",))
    compiled: list[int] = []
    compile_model = library.Core.compile_model

    def recording(core: Any, model: Any, *given: Any) -> Any:
        compiled.append(model.input("x").shape[0])
        return compile_model(core, model, *given)

    monkeypatch.setattr(library.Core, "compile_model", recording)
    for batch in (3, 1, 3, 3, 1, 2, 1, 3):
        unet_out(denoiser, X[:batch], T[:batch])
    assert compiled == [3, 1, 2, 3]


def test_settings_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = OpenVinoDenoiser(pipeline("guided").bundle, threads=1)
    unet_out(denoiser, X, T)
    (compiled,) = denoiser.compiled.made.values()
    model = compiled.requests[0].get_compiled_model()
    assert model.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert model.get_property("INFERENCE_NUM_THREADS") == 1


@pytest.mark.parametrize(
    ("threads", "batch", "parts"), [(1, 4, 1), (2, 1, 1), (2, 2, 2), (2, 3, 1), (2, 6, 2)]
)
def test_a_batch_is_divided_among_the_threads(threads: int, batch: int, parts: int) -> None:
    denoiser = OpenVinoDenoiser(pipeline("guided").bundle, threads=threads)
    expected = pipeline("guided").denoiser
    x, t, y = (np.resize(values, (batch, *values.shape[1:])) for values in (X, T, Y))
    assert error(unet_out(denoiser, x, t), unet_out(expected, x, t)) < EXACT
    found = gradient(denoiser, x, t, y)
    assert error(found, gradient(expected, x, t, y)) < EXACT
    for compiled in denoiser.compiled.made.values():
        assert len(compiled.requests) == parts
        streams = compiled.requests[0].get_compiled_model().get_property("NUM_STREAMS")
        assert streams == min(parts, available_threads())


def test_the_embedding_of_each_part_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part that bf16 computes separately, here in fp32, which every processor has and which is exact."""
    monkeypatch.setattr(library.Core, "get_property", lambda *_: ["BF16"])
    monkeypatch.setitem(backend._HINTS, "bf16", "f32")  # noqa: SLF001 - no run but a test asks for it
    denoiser = OpenVinoDenoiser(pipeline("guided").bundle, "bf16", threads=2)
    x, t = np.resize(X, (4, 1, 8, 8)), np.array([900, 898, 3, 500], dtype=np.float32)
    expected = unet_out(pipeline("guided").denoiser, x, t)
    assert error(unet_out(denoiser, x, t), expected) < EXACT


@pytest.mark.parametrize("method", ["start_async", "wait"])
def test_a_part_that_fails_fails_the_batch_when_all_have_ended(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    denoiser = OpenVinoDenoiser(pipeline("guided").bundle, threads=2, graphs=("unet",))
    expected = unet_out(denoiser, X[:2], T[:2])
    (compiled,) = denoiser.compiled.made.values()
    second = compiled.requests[1]
    accept = getattr(library.InferRequest, method)

    def refuse(request: Any, *given: Any, **options: Any) -> Any:
        done = accept(request, *given, **options)
        if request is second:
            raise RuntimeError("no\nmemory")
        return done

    with monkeypatch.context() as patch:
        patch.setattr(library.InferRequest, method, refuse)
        with pytest.raises(EngineError, match="OpenVINO cannot run graph 'unet' for a batch of 2: no memory"):
            unet_out(denoiser, X[:2], T[:2])
    np.testing.assert_array_equal(unet_out(denoiser, X[:2], T[:2]), expected)  # at once: none is busy


def test_threads_that_nobody_named() -> None:
    assert 1 <= OpenVinoDenoiser(pipeline("guided").bundle, graphs=("unet",)).threads <= available_threads()


def test_images_are_those_of_onnxruntime() -> None:
    given = Pipeline.from_bundle(exported_bundle("guided"), backend="openvino", threads=1)
    drawn = given([0, 1, 2], [4, 5, 6], batch_size=2)
    expected = pipeline("guided")([0, 1, 2], [4, 5, 6])
    assert np.abs(drawn.images.astype(int) - expected.images).max() <= 1


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--backend", "openvino", "--threads", "1", "--format", "npz", "--json"]
    assert run(["sample", str(exported_bundle("guided")), "--out", str(tmp_path / "run"), *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["backend"], result["precision"], result["chosen"]) == ("openvino", "fp32", [])


def test_a_processor_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
    with pytest.raises(RequestError, match="this processor has no bf16 instructions"):
        OpenVinoDenoiser(pipeline("guided").bundle, "bf16")


@pytest.mark.parametrize(
    "use",
    [
        "from admtrt.runtime.pipeline import Pipeline; Pipeline.from_bundle(sys.argv[1], backend='openvino')",
        "from admtrt.cli import run; run(['doctor'])",
    ],
)
def test_nothing_is_sent(use: str) -> None:
    """In a separate process, because a module is imported only once."""
    program = (
        "import os, sys, urllib.request\n"
        "urllib.request.urlopen = lambda *_, **__: sys.exit('something was sent')\n"
        f"{use}\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'\n"
    )
    others = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(exported_bundle("guided"))],
        env=others | {"PYTHONPATH": str(Path(backend.__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match="needs the package 'openvino'"):
        OpenVinoDenoiser(pipeline("guided").bundle)


def test_graphs_that_the_library_refuses(tmp_path: Path) -> None:
    path = sham_bundle(tmp_path / "bundle", classifier=CLASSIFIER).path
    with pytest.raises(BundleError, match=r"OpenVINO refuses .*unet.onnx"):
        OpenVinoDenoiser(Bundle.open(path))


def test_graphs_that_are_not_what_the_manifest_declares(tmp_path: Path) -> None:
    graph = (exported_bundle("conditional") / "unet.onnx").read_bytes()
    path = sham_bundle(tmp_path / "bundle", graph=graph).path
    with pytest.raises(BundleError, match=r"has x float32\[N, 1, 8, 8\], t float32\[N\], y int64\[N\]; the"):
        OpenVinoDenoiser(Bundle.open(path), graphs=("unet",))


def test_a_graph_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    def refusing(*_: Any) -> None:
        raise RuntimeError("no\nmemory")

    denoiser = OpenVinoDenoiser(pipeline("guided").bundle, graphs=("unet",))
    monkeypatch.setattr(openvino.Core, "compile_model", refusing)
    with pytest.raises(
        EngineError, match=r"cannot compile graph 'unet' for a batch of 3: no memory.*\n.*smaller batch"
    ):
        unet_out(denoiser, X, T)
