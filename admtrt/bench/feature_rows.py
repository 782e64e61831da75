"""Speed of feature networks: images per second on each library, and of torch-fidelity's Inception."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.bench.remote import peak_memory, run_remotely
from admtrt.bench.throughput import Measuring, ThroughputReport, ThroughputRow, measure_rows
from admtrt.contract import PRECISIONS
from admtrt.errors import RequestError
from admtrt.evaluate.extract import BACKENDS, Extractor
from admtrt.runtime.backends import registry
from admtrt.runtime.backends.default import DEFAULT_BACKEND

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from admtrt.contract import Precision
    from admtrt.evaluate.network import FeatureNetwork

FIDELITY = "torch-fidelity"
_SIZE = 256  # image size, if the graph takes any


class Looker:
    """A row that computes features, for :func:`admtrt.bench.throughput.measure_rows`."""

    def __init__(
        self,
        network: FeatureNetwork,
        backend: str,
        precision: Precision,
        batch: int,
        threads: int,
        scratch: Path,
    ) -> None:
        began = time.perf_counter()
        self._look: Callable[[NDArray[np.uint8]], object]
        if backend == FIDELITY:
            self._look, size, channels = _fidelity(threads, scratch), _SIZE, 3
        else:
            extractor = Extractor(network, backend, precision, threads=threads)
            self._look, channels = extractor, extractor.channels
            size = _SIZE if extractor.size is None else extractor.size[0]
        shape = (batch, size, size, channels)
        self._images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self._look(self._images)
        self._ready = time.perf_counter() - began
        self._look(self._images)

    def ready(self) -> float:
        """Seconds until the end of the first batch."""
        return self._ready

    def step(self) -> float:
        """Seconds of one more batch."""
        began = time.perf_counter()
        self._look(self._images)
        return time.perf_counter() - began

    def memory(self) -> int:
        """The largest resident memory so far, in bytes."""
        return peak_memory()


def _fidelity(threads: int, scratch: Path) -> Callable[[NDArray[np.uint8]], object]:
    """torch-fidelity's Inception with untrained weights, which do not change its speed."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *_: Any, **__: Any) -> None: ...

    torch.set_num_threads(threads)
    torch.save({}, scratch / "empty.pth")
    network = Unloaded("inception", ["2048", "logits_unbiased"], str(scratch / "empty.pth"))

    @torch.no_grad()
    def look(images: NDArray[np.uint8]) -> object:
        return network(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))

    return look


def feature_rows(names: Sequence[str], network: FeatureNetwork) -> list[tuple[str, Precision]]:
    """Parse rows ``BACKEND[:PRECISION]`` or ``torch-fidelity``; without any, all that can run here.

    Raises:
        RequestError: for an unknown row.
    """
    fidelity = network.kind == "inception" and find_spec("torch_fidelity") is not None
    if not names:
        libraries = [registry.BACKENDS[name] for name in BACKENDS]
        here = [one for one in libraries if one.name == DEFAULT_BACKEND or one.available()]
        names = [f"{one.name}:{precision}" for one in here for precision in one.precisions_here()]
        names += [FIDELITY] if fidelity else []
    rows: list[tuple[str, Precision]] = []
    for name in names:
        backend, _, given = name.partition(":")
        known_precisions = {**BACKENDS, FIDELITY: ("fp32",)}.get(backend, ())
        precision = next((one for one in PRECISIONS if one == (given or "fp32")), None)
        if precision not in known_precisions or precision is None:
            known = ", ".join(
                [*(f"{name}:{one}" for name, every in BACKENDS.items() for one in every), FIDELITY]
            )
            raise RequestError(f"no library {name!r} computes features", hint=f"There are: {known}.")
        if backend == FIDELITY and not fidelity:
            raise RequestError(
                "torch-fidelity's network is Inception: it is measured beside Inception's features",
                hint="Install torch-fidelity and torchvision, and give --features of the Inception weights.",
            )
        rows.append((backend, precision))
    return rows


def run_feature_bench(
    network: FeatureNetwork,
    rows: Sequence[tuple[str, Precision]],
    how: Measuring,
    *,
    batch: int,
) -> ThroughputReport:
    """Measure rows on generated images; speeds are relative to the first."""
    counted: int | None = None
    if find_spec("onnx") is not None:
        counted = run_remotely(count_graph, network.graph, log=how.scratch / "count.log")
    return measure_rows(
        f"features {network.name}, batch {batch}",
        [
            ThroughputRow(
                f"{backend}:{precision}",
                precision,
                Looker,
                (network, backend, precision, batch, how.threads, how.scratch),
            )
            for backend, precision in rows
        ],
        how,
        batch=batch,
        counted=counted,
    )


def count_graph(path: Path) -> int | None:
    """Operations per image in convolutions and products with weights; a multiply-add counts as two.

    None if the size of a feature map is unknown.
    """
    import onnx

    from admtrt.export.proto import sizes_of_value

    model = onnx.load(path)
    for axis, size in zip(model.graph.input[0].type.tensor_type.shape.dim, (1, _SIZE, _SIZE, 3), strict=True):
        if not axis.dim_value:
            axis.dim_value = size
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    sizes = {value.name: sizes_of_value(value) for value in (*graph.value_info, *graph.output)}
    weights = {weight.name: list(weight.dims) for weight in graph.initializer}
    total = 0
    for node in graph.node:
        given = weights.get(node.input[1]) if len(node.input) > 1 else None
        if given is None or node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        positions = sizes.get(node.output[0], [])[2:] if node.op_type == "Conv" else [1]
        if not positions or not all(positions):
            return None
        total += 2 * int(np.prod(given)) * int(np.prod(positions))
    return total
