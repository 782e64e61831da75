"""ONNX Runtime's execution providers for NVIDIA GPUs: CUDA, TensorRT and TensorRT-RTX.

A provider that cannot be loaded is an error. ONNX Runtime alone would silently fall back to the CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.contract import PRECISIONS
from admtrt.errors import BundleError, EngineError
from admtrt.installing import install_extra
from admtrt.memo import cache_folder
from admtrt.runtime.backends.backend import Backend
from admtrt.runtime.backends.graphs import GraphDenoiser, PerBatch, batch_of, working
from admtrt.runtime.backends.onnxruntime import ERRORS_ONLY, check_session, import_onnxruntime
from admtrt.runtime.engines.device import query_driver

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from admtrt.bundle import Bundle
    from admtrt.contract import GraphName, GraphSpec, Precision
    from admtrt.runtime.backends.choice import BackendChoice
    from admtrt.runtime.slots import Array


_NO_GRAPH = "-1"  # graph annotation that disables CUDA graphs for a run
_RTX_GENERATIONS = (8, 12)


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime for GPUs.

    Attributes:
        name: as ONNX Runtime calls it.
        extra: the extra of admtrt that installs it.
        memory: device that holds the inputs and outputs; empty if they stay on the host.
        graph_option: provider option that captures each batch size as a CUDA graph. Empty for TensorRT, whose
            option keeps one graph and would replay it for every other batch size.
        plugin: module that ships the provider's library; empty if ONNX Runtime's wheel contains it.
        loads: module whose import makes the libraries that the provider needs loadable.
    """

    name: str
    extra: str
    memory: str = ""
    graph_option: str = ""
    plugin: str = ""
    loads: str = ""


PROVIDERS: dict[str, Provider] = {
    "onnxruntime-cuda": Provider("CUDAExecutionProvider", "cuda", "cuda", "enable_cuda_graph"),
    "onnxruntime-tensorrt": Provider("TensorrtExecutionProvider", "ort-tensorrt", "cuda", loads="tensorrt"),
    "onnxruntime-rtx": Provider(
        "NvTensorRTRTXExecutionProvider", "ort-rtx", plugin="onnxruntime_ep_nv_tensorrt_rtx"
    ),
}
"""The providers, by the name of the backend."""


def require_provider(backend: str) -> None:
    """Check that ONNX Runtime has a backend's provider.

    Raises:
        MissingDependencyError: if onnxruntime is not installed.
        EngineError: if it has no such provider, or cannot load it.
    """
    provider = PROVIDERS[backend]
    onnxruntime = onnxruntime_for(backend)
    if provider.plugin:
        gpu = query_driver().gpu
        # The plugin accepts every GPU from 8.0 on, but its library builds for these only.
        if gpu is not None and gpu.compute_capability // 10 not in _RTX_GENERATIONS:
            raise EngineError(
                f"{provider.name} does not run on {gpu}: it serves compute capability 8.x and 12.x",
                hint="Use the backend onnxruntime-cuda or tensorrt.",
            )
        _plugin_devices(onnxruntime, provider)
    elif provider.name not in onnxruntime.get_available_providers():
        raise EngineError(
            f"onnxruntime {onnxruntime.__version__} is installed without {provider.name}; "
            f"it has {', '.join(onnxruntime.get_available_providers())}",
            hint="Its build for GPUs goes into another environment, as it owns the same files: "
            f"{install_extra(provider.extra)}",
        )


class ProviderDenoiser(GraphDenoiser):
    """A bundle's graphs on a GPU, through ONNX Runtime.

    It runs the engine graphs of the precision; for fp32, a bundle without them runs its CPU graphs.

    Args:
        bundle: a verified bundle.
        backend: one of :data:`PROVIDERS`.
        precision: of the graphs.
        graphs: names of the graphs to open; None opens all.

    Attributes:
        bound: by graph and batch size, the graph bound to its arrays on the GPU.

    Raises:
        BundleError: if the bundle has no graphs of this precision, or ONNX Runtime refuses one.
        EngineError: if the provider cannot be loaded.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str,
        precision: Precision = "fp32",
        *,
        graphs: Collection[GraphName] | None = None,
    ) -> None:
        require_provider(backend)
        self._library = onnxruntime_for(backend)
        self._provider = PROVIDERS[backend]
        engine = None if precision == "fp32" and "fp32" not in bundle.manifest.engine_graphs else precision
        self.specs: dict[GraphName, GraphSpec] = {}
        self._sessions: dict[GraphName, Any] = {}
        self.bound = PerBatch[_BoundRun]()
        self.any_size = not self._provider.memory
        self._captured: set[tuple[GraphName, int]] = set()
        for name in bundle.manifest.graphs:
            if graphs is not None and name not in graphs:
                continue
            self.specs[name] = bundle.graph_entry(name, engine).spec
            # An engine cache may identify a graph by its nodes alone; the manifest also distinguishes
            # weights.
            kept_for = f"{bundle.digest[:32]}-{engine}-{name}"
            with bundle.reading(name, engine) as path:
                self._sessions[name] = self._open(path, _options(self._provider, kept_for, precision))
            check_session(path, self._sessions[name], self.specs[name])

    def _run(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        batch = batch_of(feeds)
        bound = self.bound.get(graph, batch, self._bind) if self._provider.memory else None
        with working(self._provider.name, graph, batch):
            if bound is not None:
                return bound(feeds)
            names = [tensor.name for tensor in self.specs[graph].outputs]
            return dict(zip(names, self._sessions[graph].run(names, feeds), strict=True))

    def prepare(self, sizes: Mapping[GraphName, Sequence[int]]) -> None:
        """See :meth:`GraphDenoiser.prepare`; a provider without bound arrays has nothing to prepare."""
        if self._provider.memory:
            self.bound.prepare(sizes, self._bind)

    def _bind(self, name: GraphName, batch: int) -> _BoundRun:
        # ONNX Runtime never drops a CUDA graph. For a batch size that returns it would replay the old graph,
        # on freed addresses. Such a size runs without a CUDA graph.
        graph_id = _NO_GRAPH if (name, batch) in self._captured else str(batch)
        self._captured.add((name, batch))
        session, spec = self._sessions[name], self.specs[name]
        with working(self._provider.name, name, batch, what="bind"):
            return _BoundRun(self._library, session, spec, batch, self._provider.memory, graph_id)

    def _open(self, path: Path, options: Mapping[str, str]) -> Any:
        """A session with CUDA graphs, or without if the provider cannot capture this graph.

        ONNX Runtime's own fallback is off: it would switch to the CPU and print so on stdout.
        """
        graph_option, session = self._provider.graph_option, None
        if graph_option:
            with contextlib.suppress(Exception):  # the library raises types of its own
                session = self._session(path, {**options, graph_option: "1"})
        try:
            session = session or self._session(path, options)
        except Exception as error:  # as above
            raise BundleError(f"{self._provider.name} refuses {path}: {error}") from None
        if self._provider.name not in session.get_providers():
            raise EngineError(
                f"ONNX Runtime could not load {self._provider.name}, and would run on the CPU instead",
                hint="CUDA, cuDNN and, for TensorRT, its libraries must be there in the versions for which "
                f"onnxruntime {self._library.__version__} was built; `admtrt doctor` lists what is found.",
            )
        return session

    def _session(self, path: Path, options: Mapping[str, str]) -> Any:
        ort = self._library
        settings = ort.SessionOptions()
        settings.log_severity_level = ERRORS_ONLY
        if self._provider.plugin:
            settings.add_provider_for_devices(_plugin_devices(ort, self._provider)[:1], dict(options))
            return ort.InferenceSession(str(path), sess_options=settings, enable_fallback=0)
        return ort.InferenceSession(
            str(path),
            sess_options=settings,
            providers=[(self._provider.name, dict(options))],
            enable_fallback=0,
        )


class _BoundRun:
    """A graph bound to device arrays at fixed addresses, which CUDA graphs require."""

    def __init__(
        self, library: Any, session: Any, spec: GraphSpec, batch: int, memory: str, graph_id: str
    ) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._options = library.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", graph_id)

        def bound(tensors: Any, bind: Any) -> dict[str, Any]:
            values = {}
            for tensor in tensors:
                values[tensor.name] = library.OrtValue.ortvalue_from_shape_and_type(
                    tensor.sized(batch), np.dtype(tensor.dtype), memory, 0
                )
                bind(tensor.name, values[tensor.name])
            return values

        self._inputs = bound(spec.inputs, self._binding.bind_ortvalue_input)
        self._outputs = bound(spec.outputs, self._binding.bind_ortvalue_output)

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        for name, value in self._inputs.items():
            value.update_inplace(np.ascontiguousarray(feeds[name]))
        self._session.run_with_iobinding(self._binding, self._options)
        return {name: np.array(value.numpy()) for name, value in self._outputs.items()}


def _options(provider: Provider, graph: str, precision: Precision) -> dict[str, str]:
    """Options of a provider, without those for CUDA graphs; ``graph`` names its cache folder."""
    if provider.name == "CUDAExecutionProvider":
        return {"use_tf32": "0", "cudnn_conv_algo_search": "EXHAUSTIVE"}
    options: dict[str, str] = {}
    root = cache_folder()
    if root is not None:
        version = getattr(sys.modules.get(provider.loads), "__version__", "")  # caches are not portable
        kept = str(root / "onnxruntime" / provider.name / version / graph)
        with contextlib.suppress(OSError):  # providers create only the last folder of a path
            Path(kept).mkdir(parents=True, exist_ok=True)
        engines = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": kept}
        options |= {"nv_runtime_cache_path": kept} if provider.plugin else engines
    if provider.name == "TensorrtExecutionProvider" and precision != "fp32":
        options[f"trt_{precision}_enable"] = "1"
    return options


def onnxruntime_for(backend: str) -> Any:
    """Import ONNX Runtime after making the libraries of a backend's provider loadable.

    Raises:
        MissingDependencyError: if it is not installed.
    """
    library = import_onnxruntime(extra=PROVIDERS[backend].extra, purpose=f"The backend '{backend}'")
    # The loader does not search CUDA's wheels. If a library is missing, the session reports it.
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(Exception):
        library.preload_dlls()
    if PROVIDERS[backend].loads:
        with contextlib.suppress(Exception):  # it may be installed elsewhere; if not, the session reports it
            importlib.import_module(PROVIDERS[backend].loads)
    return library


def _plugin_devices(library: Any, provider: Provider) -> Any:
    """The devices that a plugin finds; the first call registers the plugin's library.

    Raises:
        EngineError: if the library cannot be loaded, or finds no device.
    """
    found = [device for device in library.get_ep_devices() if device.ep_name == provider.name]
    if found:
        return found
    try:
        plugin = importlib.import_module(provider.plugin)
        library.register_execution_provider_library(provider.name, os.fspath(plugin.get_library_path()))
    except Exception as error:  # a missing library, an old driver or a second registration
        raise EngineError(
            f"ONNX Runtime cannot load {provider.name}: {error}",
            hint="`admtrt doctor` lists what is found of drivers and libraries.",
        ) from None
    found = [device for device in library.get_ep_devices() if device.ep_name == provider.name]
    if not found:
        raise EngineError(
            f"{provider.name} finds no GPU that it supports",
            hint="Use the backend onnxruntime-cuda or tensorrt.",
        )
    return found


def _backend(
    name: str, summary: str, precisions: tuple[Precision, ...], *distributions: str, exact: bool = False
) -> Backend:
    """The backend of one of :data:`PROVIDERS`."""

    def opener(bundle: Bundle, choice: BackendChoice, graphs: Collection[GraphName] | None) -> GraphDenoiser:
        return ProviderDenoiser(bundle, name, choice.precision, graphs=graphs)

    provider = PROVIDERS[name]
    return Backend(
        name,
        summary,
        precisions,
        provider.extra,
        (("onnxruntime",), *([(provider.plugin,)] if provider.plugin else [])),
        opener,
        distributions=("onnxruntime", "onnxruntime-gpu", *distributions),
        device="cuda",
        exact=exact,
        requirement=lambda: require_provider(name),
    )


BACKENDS = (
    _backend("onnxruntime-cuda", "ONNX Runtime's CUDA kernels", ("fp32", "fp16"), exact=True),
    _backend(
        "onnxruntime-tensorrt",
        "TensorRT within ONNX Runtime",
        PRECISIONS,
        "tensorrt",
        "tensorrt-cu12",
        "tensorrt-cu13",
    ),
    _backend(
        "onnxruntime-rtx",
        "TensorRT-RTX within ONNX Runtime, by NVIDIA's plugin",
        PRECISIONS,
        "onnxruntime-ep-nv-tensorrt-rtx",
    ),
)
