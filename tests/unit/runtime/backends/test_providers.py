"""ONNX Runtime's providers, on a stub of the library: their options, cached sizes and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from bundles import exported_bundle, pipeline
from engine_rig import DRIVER
from graph_calls import gradient, unet_out

from admtrt.bundle import Bundle
from admtrt.errors import BundleError, EngineError
from admtrt.installing import install_extra
from admtrt.runtime.backends import backend as declaration
from admtrt.runtime.backends import providers
from admtrt.runtime.backends.choice import BackendChoice
from admtrt.runtime.backends.opening import open_denoiser
from admtrt.runtime.backends.providers import Provider, ProviderDenoiser
from admtrt.runtime.backends.registry import BACKENDS
from admtrt.runtime.engines.device import Driver, Gpu
from admtrt.runtime.pipeline import Pipeline

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 1, 8, 8), dtype=np.float32)
T = np.array([900, 30, 500], dtype=np.float32)
Y = np.array([2, 0, 1])


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if an NVIDIA driver were installed."""
    monkeypatch.setattr(declaration, "query_driver", lambda: DRIVER)


class Library(SimpleNamespace):
    """ONNX Runtime, whose CPU provider answers to another's name; it records how sessions are opened."""

    def __init__(self, *, refused: str = "", loaded: bool = True) -> None:
        super().__init__(**{name: getattr(onnxruntime, name) for name in ("RunOptions", "OrtValue")})
        self.__version__ = "1.99"
        self.SessionOptions = onnxruntime.SessionOptions
        self.opened: list[dict[str, str]] = []
        self.refused = refused
        self.loaded = loaded

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(  # noqa: N802
        self, path: str, *, sess_options: Any, providers: Any, enable_fallback: int
    ) -> Any:
        assert enable_fallback == 0  # otherwise it continues on the CPU, with a message on stdout
        ((name, options),) = providers
        self.opened.append(options)
        if options.get(self.refused) == "1" or self.refused == "everything":
            raise RuntimeError(f"{name} cannot do that")
        session = onnxruntime.InferenceSession(path, sess_options, providers=["CPUExecutionProvider"])
        held = [name, "CPUExecutionProvider"] if self.loaded else ["CPUExecutionProvider"]
        return _Renamed(session, held)


class _Renamed:
    def __init__(self, session: Any, names: list[str]) -> None:
        self._session, self._names = session, names

    def get_providers(self) -> list[str]:
        return self._names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, driver: None) -> Library:
    made = Library()
    monkeypatch.setattr(providers, "onnxruntime_for", lambda _: made)
    for name in ("onnxruntime-cuda", "onnxruntime-tensorrt"):
        here = Provider(providers.PROVIDERS[name].name, "cuda", "cpu", providers.PROVIDERS[name].graph_option)
        monkeypatch.setitem(providers.PROVIDERS, name, here)
    return made


def test_bound_arrays_give_what_the_cpu_gives(bundle: Bundle, library: Library) -> None:
    denoiser = open_denoiser(bundle, BackendChoice("onnxruntime-cuda"))
    expected = pipeline("guided").denoiser
    for rows in (
        slice(0, 3),
        slice(0, 2),
        slice(1, 3),
        slice(0, 3),
    ):  # other sizes, and arrays that are reused
        x, t, y = X[rows], T[rows], Y[rows]
        assert np.allclose(unet_out(denoiser, x, t), unet_out(expected, x, t), atol=1e-6)
        found = gradient(denoiser, x, t, y)
        assert np.allclose(found, gradient(expected, x, t, y), atol=1e-6)


def test_the_last_batch_sizes_are_kept(bundle: Bundle, library: Library) -> None:
    denoiser: Any = open_denoiser(bundle, BackendChoice("onnxruntime-cuda"))
    for count in (1, 2, 1, 3):
        unet_out(denoiser, X[:count], T[:count])
    gradient(denoiser, X, T, Y)
    assert list(denoiser.bound.made) == [("unet", 1), ("unet", 3), ("classifier_gradient", 3)]


@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "openvino"])
def test_prepared_batch_sizes_are_kept_and_others_share_two_places(
    bundle: Bundle, library: Library, backend: str
) -> None:
    denoiser: Any = open_denoiser(bundle, BackendChoice(backend))
    per_batch = denoiser.bound if backend == "onnxruntime-cuda" else denoiser.compiled

    def sizes(graph: str) -> list[int]:
        return sorted(size for name, size in per_batch.made if name == graph)

    unet_out(denoiser, X[:2], T[:2])
    denoiser.prepare({"unet": [1, 3], "classifier_gradient": [2]})
    assert (sizes("unet"), sizes("classifier_gradient"), sizes("update")) == ([1, 3], [2], [])
    kept = per_batch.made["unet", 1]
    for count in (2, 4, 5, 6):
        rows = np.arange(count) % 3
        assert np.allclose(
            unet_out(denoiser, X[rows], T[rows]),
            unet_out(pipeline("guided").denoiser, X[rows], T[rows]),
            atol=1e-5,
        )
    assert sizes("unet") == [1, 3, 5, 6]
    assert per_batch.made["unet", 1] is kept
    denoiser.prepare({"unet": [1, 5]})
    assert (sizes("unet"), sizes("classifier_gradient")) == ([1, 5], [])
    assert per_batch.made["unet", 1] is kept


class _Replaying(_Renamed):
    """Like CUDA graphs: an id always replays the binding of its first run."""

    def __init__(self, session: Any, names: list[str]) -> None:
        super().__init__(session, names)
        self._captured: dict[str, Any] = {}

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        name = options.get_run_config_entry("gpu_graph_id")
        captured = binding if name == "-1" else self._captured.setdefault(name, binding)
        self._session.run_with_iobinding(captured)
        assert len(self._captured) <= 3  # it never forgets one, so there is one a size


def test_a_size_that_comes_again_replays_no_old_graph(
    bundle: Bundle, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "_Renamed", _Replaying)
    denoiser = open_denoiser(bundle, BackendChoice("onnxruntime-cuda"))
    for count in (1, 2, 3, 1, 1):
        out = unet_out(denoiser, X[:count], T[:count])
        expected = unet_out(pipeline("guided").denoiser, X[:count], T[:count])
        assert np.allclose(out, expected, atol=1e-6)


def test_a_library_that_fails_while_it_runs(
    bundle: Bundle, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("cudaErrorMemoryAllocation: out of memory\nat line 3")

    monkeypatch.setattr(_Renamed, "run_with_iobinding", full, raising=False)
    with pytest.raises(EngineError) as raised:
        unet_out(open_denoiser(bundle, BackendChoice("onnxruntime-cuda")), X, T)
    assert raised.value.message == (
        "CUDAExecutionProvider cannot run graph 'unet' for a batch of 3: "
        "cudaErrorMemoryAllocation: out of memory at line 3"
    )
    assert "use a smaller batch" in raised.value.hint


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "onnxruntime-cuda"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": X[:, :, :5]},
            r"takes x float32\[N, 1, 8, 8\]; in a batch of 3 it was given float32\[3, 1, 5, 8\]",
        ),
        ({"x": X.astype(np.float64)}, r"it was given float64\[3, 1, 8, 8\]"),
        ({"t": T.astype(np.int64)}, r"takes t float32\[N\]; in a batch of 3 it was given int64\[3\]"),
        ({"t": T[:2]}, r"in a batch of 3 it was given float32\[2\]"),
        ({"y": Y}, r"takes x, t; it was given x, t, y"),
        ({"t": None}, r"takes x, t; it was given x$"),
    ],
)
def test_inputs_that_are_not_the_graph_s(
    bundle: Bundle, library: Library, backend: str, changes: dict[str, Any], message: str
) -> None:
    feeds = {name: given for name, given in ({"x": X, "t": T} | changes).items() if given is not None}
    with pytest.raises(ValueError, match=f"graph 'unet' .*{message}"):
        open_denoiser(bundle, BackendChoice(backend)).run("unet", feeds)


def test_outputs_belong_to_the_caller(bundle: Bundle, library: Library) -> None:
    denoiser = open_denoiser(bundle, BackendChoice("onnxruntime-cuda"))
    first = unet_out(denoiser, X, T)
    kept = first.copy()
    unet_out(denoiser, -X, T)
    assert np.array_equal(first, kept)


def test_arrays_that_are_not_contiguous(bundle: Bundle, library: Library) -> None:
    denoiser = open_denoiser(bundle, BackendChoice("onnxruntime-cuda"))
    assert np.array_equal(unet_out(denoiser, X[:, :, ::-1], T), unet_out(denoiser, X[:, :, ::-1].copy(), T))


def test_images_through_a_provider(library: Library) -> None:
    given = Pipeline.from_bundle(exported_bundle("guided"), backend="onnxruntime-cuda")
    expected = pipeline("guided")([0, 1, 2], [4, 5, 6])
    drawn = given([0, 1, 2], [4, 5, 6], batch_size=2)
    assert np.abs(drawn.images.astype(int) - expected.images).max() <= 1


def test_cuda_is_asked_for_exact_products_and_graphs(bundle: Bundle, library: Library) -> None:
    open_denoiser(bundle, BackendChoice("onnxruntime-cuda"))
    assert all(options["use_tf32"] == "0" for options in library.opened)
    assert all(options["enable_cuda_graph"] == "1" for options in library.opened)
    assert len(library.opened) == len(pipeline("guided").bundle.manifest.graphs)


def test_a_graph_that_cannot_be_captured_runs_without(bundle: Bundle, library: Library) -> None:
    library.refused = "enable_cuda_graph"
    unet_out(open_denoiser(bundle, BackendChoice("onnxruntime-cuda")), X, T)
    assert ["enable_cuda_graph" in options for options in library.opened] == [True, False] * len(
        pipeline("guided").bundle.manifest.graphs
    )


def test_a_graph_that_is_refused(bundle: Bundle, library: Library) -> None:
    library.refused = "everything"
    with pytest.raises(BundleError, match=r"CUDAExecutionProvider refuses .*unet.onnx: .* cannot do that"):
        open_denoiser(bundle, BackendChoice("onnxruntime-cuda"))


def test_a_provider_that_is_not_loaded_is_no_silent_cpu(bundle: Bundle, library: Library) -> None:
    library.loaded = False
    with pytest.raises(EngineError, match="could not load CUDAExecutionProvider, and would run on the CPU"):
        open_denoiser(bundle, BackendChoice("onnxruntime-cuda"))


def test_engines_are_kept_apart_by_weights_and_graph(
    bundle: Bundle, library: Library, tmp_path: Path, cache: Path
) -> None:
    open_denoiser(bundle, BackendChoice("onnxruntime-tensorrt"))
    first = [options["trt_engine_cache_path"] for options in library.opened]
    assert len(set(first)) == len(pipeline("guided").bundle.manifest.graphs)
    assert all(Path(path).is_relative_to(cache) for path in first)
    assert all(Path(path).is_dir() for path in first)  # the provider would make one level alone
    assert not any(
        "trt_cuda_graph_enable" in options for options in library.opened
    )  # one graph for all sizes
    assert not any("trt_fp16_enable" in options for options in library.opened)
    with pytest.raises(BundleError, match="has no engine graphs in fp16"):
        open_denoiser(bundle, BackendChoice("onnxruntime-tensorrt", "fp16"))
    other = json.loads((bundle.path / "manifest.json").read_text()) | {"made_with": {"other": "weights"}}
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in bundle.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "manifest.json").write_text(json.dumps(other))
    library.opened.clear()
    ProviderDenoiser(Bundle.open(copy), "onnxruntime-tensorrt")
    assert not set(first) & {options["trt_engine_cache_path"] for options in library.opened}


def test_the_wheel_for_cpus_lacks_the_provider(driver: None) -> None:
    assert "CUDAExecutionProvider" not in onnxruntime.get_available_providers()
    with pytest.raises(EngineError) as raised:
        BACKENDS["onnxruntime-cuda"].require()
    assert "is installed without CUDAExecutionProvider; it has" in raised.value.message
    assert install_extra("cuda") in raised.value.hint


class Plugin(Library):
    """ONNX Runtime with a plugin, which is registered once and finds some devices."""

    def __init__(self, devices: int, *, fault: str = "") -> None:
        super().__init__()
        self.registered: list[str] = []
        self.devices, self.fault = devices, fault

    def get_ep_devices(self) -> list[SimpleNamespace]:
        found = self.devices if self.registered else 0
        cpu = SimpleNamespace(ep_name="CPUExecutionProvider")
        return [cpu, *[SimpleNamespace(ep_name="NvTensorRTRTXExecutionProvider", i=i) for i in range(found)]]

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if self.fault:
            raise RuntimeError(self.fault)
        self.registered.append(f"{name} {path}")

    def SessionOptions(self) -> Any:  # noqa: N802
        options = onnxruntime.SessionOptions()
        plugin = self

        class Recording:
            def add_provider_for_devices(self, devices: list[Any], given: dict[str, str]) -> None:
                assert [device.i for device in devices] == [0]
                plugin.opened.append(given)

            def __setattr__(self, name: str, value: Any) -> None:
                setattr(options, name, value)

        return Recording()

    def InferenceSession(self, path: str, *, sess_options: Any, enable_fallback: int) -> Any:  # noqa: N802
        assert enable_fallback == 0
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return _Renamed(session, ["NvTensorRTRTXExecutionProvider", "CPUExecutionProvider"])

    def refuse(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no")


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch, driver: None) -> Plugin:
    made = Plugin(devices=2)
    module = ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    module.get_library_path = lambda: Path("plugin.so")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(declaration, "is_installed", lambda _: True)
    monkeypatch.setattr(providers, "onnxruntime_for", lambda _: made)
    del made.SessionOptions  # that of the base is an attribute of the object
    return made


def test_a_plugin_is_registered_once_and_runs(bundle: Bundle, plugin: Plugin, cache: Path) -> None:
    denoiser = open_denoiser(bundle, BackendChoice("onnxruntime-rtx"))
    assert plugin.registered == ["NvTensorRTRTXExecutionProvider plugin.so"]
    graphs = pipeline("guided").bundle.manifest.graphs
    assert len({options["nv_runtime_cache_path"] for options in plugin.opened}) == len(graphs)
    expected = unet_out(pipeline("guided").denoiser, X, T)
    assert np.allclose(unet_out(denoiser, X, T), expected, atol=1e-6)


def test_a_gpu_that_the_plugin_takes_and_its_library_does_not(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper = Driver(cuda="13.1", gpus=(Gpu("H100", 90, 2**36),))
    monkeypatch.setattr(providers, "query_driver", lambda: hopper)
    with pytest.raises(EngineError, match=r"does not run on H100 \(SM90\): it serves"):
        BACKENDS["onnxruntime-rtx"].require()
    assert not plugin.registered


def test_a_graph_that_a_plugin_refuses_is_tried_once(bundle: Bundle, plugin: Plugin) -> None:
    plugin.InferenceSession = plugin.refuse  # type: ignore[method-assign]
    with pytest.raises(BundleError, match=r"NvTensorRTRTXExecutionProvider refuses .*: no"):
        open_denoiser(bundle, BackendChoice("onnxruntime-rtx"))
    assert len(plugin.opened) == 1


def test_tensorrt_is_put_where_the_loader_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    monkeypatch.setattr(providers, "importlib", SimpleNamespace(import_module=imported.append))
    providers.onnxruntime_for("onnxruntime-cuda")
    assert imported == []
    providers.onnxruntime_for("onnxruntime-tensorrt")
    assert imported == ["tensorrt"]


def test_a_plugin_without_a_device(plugin: Plugin) -> None:
    plugin.devices = 0
    with pytest.raises(EngineError, match="NvTensorRTRTXExecutionProvider finds no GPU that it supports"):
        BACKENDS["onnxruntime-rtx"].require()


def test_a_plugin_that_cannot_be_loaded(plugin: Plugin) -> None:
    plugin.fault = "libfoo.so: cannot open shared object file"
    with pytest.raises(EngineError, match=r"cannot load NvTensorRTRTXExecutionProvider: libfoo.so"):
        BACKENDS["onnxruntime-rtx"].require()
