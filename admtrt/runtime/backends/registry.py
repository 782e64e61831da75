"""The backends by name: what each is, whether it can run here, and how it is opened."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from admtrt.contract import PRECISIONS
from admtrt.errors import EngineError, MissingDependencyError, UserError
from admtrt.runtime.backends.providers import PROVIDERS, ProviderDenoiser, require_provider
from admtrt.runtime.engines.device import query_driver

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from admtrt.bundle import Bundle
    from admtrt.contract import GraphName, Precision
    from admtrt.runtime.backends.choice import BackendChoice
    from admtrt.runtime.backends.graphs import GraphDenoiser

    Graphs = Collection[GraphName] | None
    Opener = Callable[[Bundle, BackendChoice, Graphs], GraphDenoiser]
    """Opens one backend, which takes of the choice what it needs."""

PLANS_ONLY = "tensorrt"
"""The backend that runs plans, and so takes a folder of them."""


@dataclass(frozen=True)
class Availability:
    """Tells whether a backend can run on this machine.

    Attributes:
        reason: why it cannot; empty where it can.
        hint: what to do about it.
    """

    reason: str = ""
    hint: str = ""

    def __bool__(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Backend:
    """One way to run a bundle's graphs.

    Attributes:
        name: as given by ``--backend``.
        summary: what it is, for people.
        precisions: those that it computes in.
        extra: of admtrt, which installs it; several of which one will do, with "or" between.
        packages: what it needs: one module of each group, which the first names.
        device: where it runs.
        exact: whether its fp32 is float32 throughout; engines may round products to TF32.
    """

    name: str
    summary: str
    precisions: tuple[Precision, ...]
    extra: str
    packages: tuple[tuple[str, ...], ...]
    device: Literal["cpu", "cuda"] = "cpu"
    exact: bool = True

    def require(self) -> None:
        """Make sure that its packages are installed and, for a CUDA backend, that a driver is there.

        Raises:
            MissingDependencyError: naming the package.
            EngineError: if there is no driver, or the provider cannot be loaded.
        """
        for group in self.packages:
            if not any(_is_installed(name) for name in group):
                raise MissingDependencyError(group[0], extra=self.extra, purpose=f"The backend '{self.name}'")
        driver = query_driver() if self.device == "cuda" else None
        if driver is not None and driver.gpu is None:
            raise EngineError(
                f"the backend '{self.name}' needs an NVIDIA GPU: {driver.fault}",
                hint="Install the driver, or use a backend for CPUs: onnxruntime, openvino.",
            )
        if self.name in PROVIDERS:
            require_provider(self.name)

    def available(self) -> Availability:
        """Availability by :meth:`require`, with the reason where it is missing."""
        try:
            self.require()
        except UserError as error:
            return Availability(error.message, error.hint)
        return Availability()

    def precisions_here(self) -> tuple[Precision, ...]:
        """Those precisions that this machine has; the packages have to be there."""
        if self.name != "openvino":
            return self.precisions
        from admtrt.runtime.backends.openvino import computes_bf16

        return self.precisions if computes_bf16() else ("fp32",)

    def open(
        self, bundle: Bundle, choice: BackendChoice, *, graphs: Collection[GraphName] | None = None
    ) -> GraphDenoiser:
        """Open a bundle's graphs, or only those that are named where the backend can open some alone.

        The choice may be that of ``auto``: threads are for CPU backends and plans for those that run them.

        Raises:
            UserError: if the backend cannot run here, or the bundle lacks what it needs.
        """
        self.require()
        return _OPENERS[self.name](bundle, choice, graphs)


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is within
        return False


def _onnxruntime(bundle: Bundle, choice: BackendChoice, graphs: Graphs) -> GraphDenoiser:
    from admtrt.runtime.backends.onnxruntime import OnnxRuntimeDenoiser

    return OnnxRuntimeDenoiser(bundle, threads=choice.threads, graphs=graphs)


def _openvino(bundle: Bundle, choice: BackendChoice, graphs: Graphs) -> GraphDenoiser:
    from admtrt.runtime.backends.openvino import OpenVinoDenoiser

    return OpenVinoDenoiser(bundle, choice.precision, threads=choice.threads, graphs=graphs)


def _tensorrt(bundle: Bundle, choice: BackendChoice, _: Graphs) -> GraphDenoiser:
    from admtrt.runtime.backends.tensorrt import TensorRTDenoiser

    return TensorRTDenoiser(bundle, choice.precision, plans=choice.plans)


def _provider(name: str) -> Opener:
    return lambda bundle, choice, graphs: ProviderDenoiser(bundle, name, choice.precision, graphs=graphs)


_OPENERS: dict[str, Opener] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    PLANS_ONLY: _tensorrt,
    **{name: _provider(name) for name in PROVIDERS},
}
_ORT = ("onnxruntime",)
_RTX_PLUGIN = ("onnxruntime_ep_nv_tensorrt_rtx",)
_TENSORRT = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("onnxruntime", "ONNX Runtime on the CPU: the default", ("fp32",), "cpu", (_ORT,)),
        Backend("openvino", "OpenVINO on the CPU", ("fp32", "bf16"), "openvino", (("openvino",),)),
        Backend(
            "onnxruntime-cuda",
            "ONNX Runtime's CUDA kernels",
            ("fp32", "fp16"),
            PROVIDERS["onnxruntime-cuda"].extra,
            (_ORT,),
            device="cuda",
        ),
        Backend(
            "onnxruntime-tensorrt",
            "TensorRT within ONNX Runtime",
            PRECISIONS,
            PROVIDERS["onnxruntime-tensorrt"].extra,
            (_ORT,),
            device="cuda",
            exact=False,
        ),
        Backend(
            "onnxruntime-rtx",
            "TensorRT-RTX within ONNX Runtime, by NVIDIA's plugin",
            PRECISIONS,
            PROVIDERS["onnxruntime-rtx"].extra,
            (_ORT, _RTX_PLUGIN),
            device="cuda",
            exact=False,
        ),
        Backend(
            PLANS_ONLY,
            "engines of admtrt build, on TensorRT or TensorRT-RTX",
            PRECISIONS,
            "tensorrt or rtx",
            (_TENSORRT, ("cuda.core",)),
            device="cuda",
            exact=False,
        ),
    )
}
"""In order of preference; ``auto`` chooses among them."""
