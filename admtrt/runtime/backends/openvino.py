"""OpenVINO on the CPU: fp32 exactly, or bf16 where the processor multiplies it."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.contract import is_network
from admtrt.errors import BundleError, RequestError
from admtrt.onnx_wire import external_locations
from admtrt.runtime.backends.backend import Backend
from admtrt.runtime.backends.graphs import GraphDenoiser, PerBatch, batch_of, check_contract, working
from admtrt.runtime.backends.mapped import releasing
from admtrt.runtime.backends.openvino_passes import (
    EMBEDDING,
    cut_embedding,
    normalise_by_channel,
    separate_weights,
)
from admtrt.runtime.backends.quiet import import_silent
from admtrt.runtime.machine import available_threads

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from admtrt.bundle import Bundle
    from admtrt.contract import GraphName, GraphSpec, Precision
    from admtrt.runtime.backends.choice import BackendChoice
    from admtrt.runtime.slots import Array

_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
_HINTS: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16"}
_DTYPES = {"f32": "float32", "i64": "int64"}


class OpenVinoDenoiser(GraphDenoiser):
    """A bundle's graphs on the CPU, compiled for each batch size when it first comes.

    A graph of fixed sizes runs up to twice as fast as one with a dynamic batch, which is worth compiling each
    size. A batch that divides evenly among the threads is split: threads that work apart do not wait for each
    other.

    Args:
        bundle: a verified bundle.
        precision: in which OpenVINO computes; ``fp32`` forbids the bf16 that it would choose by default.
        threads: threads per graph; None lets OpenVINO take every core.
        graphs: names of the graphs to open; None opens all.

    Attributes:
        threads: of each graph.
        compiled: the compiled graphs, by graph and batch size.

    Raises:
        MissingDependencyError: if openvino is not installed.
        RequestError: if the processor does not support this precision.
        BundleError: if OpenVINO refuses a graph, or the inputs or outputs of a graph differ from the
            manifest.
    """

    any_size = False
    copies_weights = True

    def __init__(
        self,
        bundle: Bundle,
        precision: Precision = "fp32",
        *,
        threads: int | None = None,
        graphs: Collection[GraphName] | None = None,
    ) -> None:
        self._core = import_openvino().Core()
        if precision == "bf16" and not computes_bf16():
            raise RequestError(
                "this processor has no bf16 instructions, so OpenVINO would compute in fp32",
                hint="Use --precision fp32.",
            )
        self._precision = precision
        self.threads = _threads_of(self._core) if threads is None else threads
        self._bundle = bundle
        self.specs: dict[GraphName, GraphSpec] = {}
        self.compiled = PerBatch[_Compiled]()  # each compiled graph has a copy of the weights
        for name in bundle.manifest.graphs:
            if graphs is not None and name not in graphs:
                continue
            self.specs[name] = bundle.graph_entry(name).spec
            try:
                model = self._read(name)
            except BundleError:
                raise
            except Exception as error:  # the library raises RuntimeError and other types
                raise BundleError(f"OpenVINO refuses {bundle.graph_path(name)}: {error}") from None
            path = bundle.graph_path(name)
            check_contract(path, _shown(model.inputs), _shown(model.outputs), self.specs[name])

    def _run(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        batch = batch_of(feeds)
        compiled = self.compiled.get(graph, batch, self._compile)
        with working("OpenVINO", graph, batch):
            results = compiled(feeds)
        return {tensor.name: results[tensor.name] for tensor in self.specs[graph].outputs}

    def prepare(self, sizes: Mapping[GraphName, Sequence[int]]) -> None:
        """See :meth:`GraphDenoiser.prepare`."""
        self.compiled.prepare(sizes, self._compile)

    def _read(self, name: GraphName) -> Any:
        with self._bundle.reading(name) as path:
            model = self._core.read_model(str(path))
        separate_weights(model)
        return model

    def _compile(self, name: GraphName, batch: int) -> _Compiled:
        precision = self._precision if is_network(name) else "fp32"  # the update must not round x
        parts = math.gcd(batch, self.threads)
        # OpenVINO packs copies of the weights, and keeps the file mapped.
        path = self._bundle.graph_path(name)
        weights = [path.parent / data for data in external_locations(path)]
        with working("OpenVINO", name, batch, what="compile"), releasing(weights):
            model = self._read(name)
            model.reshape(
                {tensor.name: list(tensor.sized(batch // parts)) for tensor in self.specs[name].inputs}
            )
            normalise_by_channel(model)
            return _Compiled(self._core, model, precision, parts, self.threads)


class _Compiled:
    """A graph compiled for one batch size, which runs the batch in equal parts side by side.

    In bf16, OpenVINO rounds every operator's input, including the timestep: with 8 significant bits, four
    neighbouring timesteps near 900 become equal. The layers that depend on ``t`` alone are therefore a
    separate model in fp32.

    Args:
        core: OpenVINO's ``Core``.
        model: with the batch size of one part.
        precision: in which it computes.
        parts: number of parts; each gets its share of the threads.
        threads: of all parts together.
    """

    def __init__(self, core: Any, model: Any, precision: Precision, parts: int, threads: int) -> None:
        settings = {
            "NUM_STREAMS": parts,
            "INFERENCE_NUM_THREADS": threads,
            # No pinning: pinned threads compete for their cores with other processes and with other graphs'
            # threads.
            "ENABLE_CPU_PINNING": False,
        }

        def compiled(part: Any, hint: str) -> Any:
            return core.compile_model(part, "CPU", settings | {"INFERENCE_PRECISION_HINT": hint})

        embedding = cut_embedding(model) if precision == "bf16" else None
        self._embed = None if embedding is None else compiled(embedding, "f32").create_infer_request()
        made = compiled(model, _HINTS[precision])
        self.requests = [made.create_infer_request() for _ in range(parts)]
        # An output may carry the name of a removed tensor beside its own.
        self._ports = [(port, tuple(port.names)) for port in self.requests[0].model_outputs]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, for inputs of the whole batch."""
        split = {name: np.split(value, len(self.requests)) for name, value in feeds.items()}
        given = [dict(zip(split, part, strict=True)) for part in zip(*split.values(), strict=True)]
        if self._embed is not None:
            for part in given:
                part[EMBEDDING] = self._embed.infer({"t": part.pop("t")}, share_inputs=True)[0]
        try:
            for request, part in zip(self.requests, given, strict=True):
                request.start_async(part, share_inputs=True)
            for request in self.requests:
                request.wait()
        except BaseException:
            for request in self.requests:  # no request may still read the caller's arrays
                with contextlib.suppress(Exception):
                    request.wait()
            raise
        outputs: dict[str, Array] = {}
        for port, names in self._ports:
            parts = [request.get_tensor(port).data for request in self.requests]
            outputs |= dict.fromkeys(names, np.concatenate(parts))
        return outputs


def computes_bf16() -> bool:
    """True if this processor multiplies in bf16; otherwise OpenVINO would compute in fp32.

    Raises:
        UserError: as :func:`import_openvino`.
    """
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def import_openvino() -> Any:
    """The library; see :func:`~admtrt.runtime.backends.quiet.import_silent`."""
    return import_silent("openvino", extra="openvino", purpose="The backend 'openvino'")


def _threads_of(core: Any) -> int:
    """The number of threads that OpenVINO chooses for latency: one per physical core."""
    from openvino import Model, Type, opset13

    x = opset13.parameter([1], Type.f32)
    compiled = core.compile_model(Model([opset13.relu(x)], [x], ""), "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    return min(int(compiled.get_property("INFERENCE_NUM_THREADS")), available_threads())


def _shown(ports: Any) -> list[str]:
    return [
        f"{port.any_name} {_DTYPES.get(port.element_type.get_type_name(), port.element_type.get_type_name())}"
        f"[{', '.join('N' if size.is_dynamic else str(size.get_length()) for size in port.partial_shape)}]"
        for port in ports
    ]


def _open(bundle: Bundle, choice: BackendChoice, graphs: Collection[GraphName] | None) -> GraphDenoiser:
    return OpenVinoDenoiser(bundle, choice.precision, threads=choice.threads, graphs=graphs)


def _precisions_here() -> tuple[Precision, ...]:
    return _PRECISIONS if computes_bf16() else ("fp32",)


BACKENDS = (
    Backend(
        "openvino",
        "OpenVINO on the CPU",
        _PRECISIONS,
        "openvino",
        (("openvino",),),
        _open,
        distributions=("openvino",),
        narrowed=_precisions_here,
    ),
)
