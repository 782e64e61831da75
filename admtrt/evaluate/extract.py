"""Features of images on an inference library: uint8 images in, float32 arrays by name out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from admtrt.errors import BundleError, EngineError, MissingDependencyError, RequestError
from admtrt.evaluate.network import LOGITS, POOL, SPATIAL
from admtrt.images import to_pillow
from admtrt.memo import Memo
from admtrt.runtime.backends import registry
from admtrt.runtime.backends.names import OF_FEATURES
from admtrt.runtime.backends.onnxruntime import ERRORS_ONLY, import_onnxruntime
from admtrt.runtime.backends.openvino import computes_bf16, import_openvino

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from admtrt.evaluate.frechet import Features
    from admtrt.evaluate.network import FeatureNetwork

AUTO = "auto"
_TIMED_BATCH = 8
_KEPT_SHAPES = 2  # full batches and a remainder
_Sizes = tuple[int | None, ...]


class Runner(Protocol):
    """Runs a graph on a library.

    Attributes:
        input: name, element type and sizes of its only input; None is a dynamic size.
        outputs: the same for each output.
    """

    input: tuple[str, str, _Sizes]
    outputs: list[tuple[str, str, _Sizes]]

    def run(self, images: NDArray[np.uint8]) -> Sequence[NDArray[Any]]:
        """Run the graph: every output, in order."""
        ...


class Extractor:
    """Images to features.

    Args:
        network: the graph and its manifest.
        backend: one of :data:`BACKENDS`, or ``auto`` for the fastest here, measured once and remembered.
        precision: ``fp32``, or ``bf16`` if the backend and the processor support it.
        threads: None takes every core.
        note: called with what ``auto`` measures.

    Attributes:
        backend: the backend that it runs on.
        size: height and width that the graph requires; None for any.
        channels: number of channels that it takes.
        outputs: which of ``pool``, ``spatial`` and ``logits`` it has.

    Raises:
        RequestError: for an unknown backend or an unsupported precision.
        BundleError: if the graph is refused, or is not a feature network.
        UserError: if a library is missing.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        backend: str = "onnxruntime",
        precision: str = "fp32",
        *,
        threads: int | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        check_backend(backend, precision)
        self.network, self.precision = network, precision
        if backend == AUTO:
            backend = _fastest(network, precision, threads, note)
        self.backend = backend
        self._runner = _open(network.graph, backend, precision, threads)
        name, kind, sizes = self._runner.input
        if kind != "uint8" or len(sizes) != 4 or sizes[3] not in (1, 3):
            shown = ", ".join("N" if size is None else str(size) for size in sizes)
            raise BundleError(
                f"{network.graph}: the input {name} is {kind} [{shown}]; expected uint8 [N, H, W, 3]",
                hint="Scaling and the order of axes belong into the graph.",
            )
        self.channels = int(sizes[3])
        fixed = (sizes[1], sizes[2])
        self.size = None if None in fixed else (int(fixed[0] or 0), int(fixed[1] or 0))
        self._places = _places(network.graph, self._runner.outputs)
        self.outputs = tuple(self._places)

    @property
    def resize(self) -> str:
        """Describes how images are resized to the network's input size."""
        manifest = self.network.manifest
        if manifest is not None and self.size is None:
            return manifest.resize
        return "in the graph" if self.size is None else "Pillow bicubic, where the size differs"

    def __call__(self, images: NDArray[np.uint8]) -> dict[str, Features]:
        """Compute features [n, D] by output name, of images uint8 [n, H, W, C].

        Raises:
            RequestError: if the images have channels that the network does not take.
            EngineError: if the library fails, most often for want of memory.
        """
        prepared = self._fitted(images)
        try:
            results = self._runner.run(prepared)
        except Exception as error:  # each library raises its own types
            reason = " ".join(str(error).split()) or type(error).__name__
            raise EngineError(
                f"{self.backend} cannot compute features of {len(images)} images: {reason}",
                hint="Where memory ran out, use a smaller --batch-size.",
            ) from error
        made = {name: np.array(results[place], np.float32) for name, place in self._places.items()}
        for name, values in made.items():
            if values.ndim != 2 or len(values) != len(images):
                raise BundleError(
                    f"{self.network.graph}: {name} is {list(values.shape)} for {len(images)} images; "
                    "expected [N, D]"
                )
        return made

    def _fitted(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        channels = images.shape[3]
        if channels != self.channels and channels != 1:
            raise RequestError(
                f"the images have {channels} channels; the features '{self.network.name}' take "
                f"{self.channels}"
            )
        if self.size is not None and images.shape[1:3] != self.size:
            from PIL import Image

            height, width = self.size
            resized = [
                np.asarray(to_pillow(one).resize((width, height), Image.Resampling.BICUBIC)) for one in images
            ]
            images = np.stack(resized).reshape(len(images), height, width, channels)
        if channels != self.channels:
            images = np.repeat(images, self.channels, axis=3)
        return np.ascontiguousarray(images)


def check_backend(backend: str, precision: str) -> None:
    """Refuse a choice that no machine could open.

    Raises:
        RequestError: for an unknown backend or an unsupported precision.
    """
    if backend != AUTO and backend not in BACKENDS:
        raise RequestError(f"features run on {', '.join(BACKENDS)} or {AUTO}; {backend!r} is none of them")
    having = [name for name, precisions in BACKENDS.items() if precision in precisions]
    if not having:
        raise RequestError(f"precision {precision!r} is unknown for features; expected fp32 or bf16")
    if backend != AUTO and backend not in having:
        raise RequestError(
            f"backend {backend!r} computes features in {' or '.join(BACKENDS[backend])}, not in {precision}",
            hint=f"Backends with {precision}: {', '.join(having)}.",
        )


def _places(graph: Path, outputs: Sequence[tuple[str, str, _Sizes]]) -> dict[str, int]:
    """Match outputs to roles. If none is called ``pool``, it is the only output of rank 2, or the first."""
    flat = [(name, place) for place, (name, _, sizes) in enumerate(outputs) if len(sizes) == 2]
    named = {name: place for name, place in flat if name in (POOL, SPATIAL, LOGITS)}
    rest = [place for name, place in flat if name not in named]
    if POOL not in named and rest:
        named[POOL] = rest[0]
    if POOL not in named:
        shown = ", ".join(f"{name} of rank {len(sizes)}" for name, _, sizes in outputs)
        raise BundleError(f"{graph} has the outputs {shown}; expected features [N, D]")
    return {name: named[name] for name in (POOL, SPATIAL, LOGITS) if name in named}


def _open(graph: Path, backend: str, precision: str, threads: int | None) -> Runner:
    try:
        return _RUNNERS[backend](graph, precision, threads)
    except (MissingDependencyError, RequestError, EngineError):
        raise
    except Exception as error:  # the libraries raise types of their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BundleError(f"{backend} refuses {graph}: {reason}") from None


def _fastest(
    network: FeatureNetwork, precision: str, threads: int | None, note: Callable[[str], None]
) -> str:
    """The faster backend for a network, as measured once on this machine."""
    candidates = [name for name, precisions in BACKENDS.items() if precision in precisions]
    memo = Memo("features")
    key = f"{network.digest[:32]} {precision} {threads}"
    remembered = memo.get(key)
    if remembered in candidates:
        return str(remembered)
    seconds: dict[str, float] = {}
    for name in candidates:
        try:
            extractor = Extractor(network, name, precision, threads=threads)
        except MissingDependencyError:
            continue
        height, width = extractor.size or (64, 64)
        images = np.zeros((_TIMED_BATCH, height, width, extractor.channels), np.uint8)
        extractor(images)  # compiles
        start = time.perf_counter()
        extractor(images)
        seconds[name] = time.perf_counter() - start
    if not seconds:
        raise MissingDependencyError("onnxruntime", extra="cpu", purpose="Computing features")
    chosen = min(seconds, key=lambda name: seconds[name])
    speeds = ", ".join(f"{name} {_TIMED_BATCH / took:.3g} images/s" for name, took in seconds.items())
    note(f"features '{network.name}': {speeds}; {chosen} is taken")
    memo.update({key: chosen})
    return chosen


class _OnnxRuntime:
    """See :class:`Runner`."""

    _types: ClassVar = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}

    def __init__(self, graph: Path, precision: str, threads: int | None) -> None:  # noqa: ARG002
        library = import_onnxruntime(extra="cpu", purpose="Computing features")
        options = library.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session = library.InferenceSession(
            str(graph), sess_options=options, providers=["CPUExecutionProvider"]
        )
        inputs = [self._described(value) for value in self._session.get_inputs()]
        if len(inputs) != 1:
            raise EngineError(f"{graph} has {len(inputs)} inputs; expected images alone")
        self.input = inputs[0]
        self.outputs = [self._described(value) for value in self._session.get_outputs()]

    def _described(self, value: Any) -> tuple[str, str, _Sizes]:
        sizes = tuple(size if isinstance(size, int) else None for size in value.shape)
        return value.name, self._types.get(value.type, value.type), sizes

    def run(self, images: NDArray[np.uint8]) -> Sequence[NDArray[Any]]:
        results: Sequence[NDArray[Any]] = self._session.run(None, {self.input[0]: images})
        return results


class _OpenVino:
    """See :class:`Runner`; compiled for each shape of a batch."""

    _types: ClassVar = {"u8": "uint8", "f32": "float32"}

    def __init__(self, graph: Path, precision: str, threads: int | None) -> None:
        self._core = import_openvino().Core()
        if precision == "bf16" and not computes_bf16():
            raise RequestError(
                "this processor has no bf16 instructions, so OpenVINO would compute in fp32",
                hint="Use --precision fp32.",
            )
        self._graph = graph
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"
        }
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = threads
        model = self._core.read_model(str(graph))
        if len(model.inputs) != 1:
            raise EngineError(f"{graph} has {len(model.inputs)} inputs; expected images alone")
        self.input = self._described(model.inputs[0])
        self.outputs = [self._described(port) for port in model.outputs]
        self._compiled: dict[tuple[int, ...], Any] = {}

    def _described(self, port: Any) -> tuple[str, str, _Sizes]:
        sizes = tuple(None if size.is_dynamic else size.get_length() for size in port.partial_shape)
        kind = port.element_type.get_type_name()
        return port.any_name, self._types.get(kind, kind), sizes

    def run(self, images: NDArray[np.uint8]) -> Sequence[NDArray[Any]]:
        shape = images.shape
        compiled = self._compiled.pop(shape, None)
        if compiled is None:
            if len(self._compiled) >= _KEPT_SHAPES:
                del self._compiled[next(iter(self._compiled))]
            model = self._core.read_model(str(self._graph))
            model.reshape(list(shape))
            compiled = self._core.compile_model(model, "CPU", self._settings)
        self._compiled[shape] = compiled  # the dictionary is ordered by use
        results = compiled({0: images})
        return [results[port] for port in compiled.outputs]


_RUNNERS: dict[str, Callable[[Path, str, int | None], Runner]] = {
    "onnxruntime": _OnnxRuntime,
    "openvino": _OpenVino,
}
assert _RUNNERS.keys() == set(OF_FEATURES), "the names of names.py are not those of the runners"
BACKENDS = {name: registry.BACKENDS[name].precisions for name in OF_FEATURES}
"""Libraries that compute features, with their precisions."""
