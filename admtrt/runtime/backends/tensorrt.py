"""Plans of TensorRT or TensorRT-RTX on a GPU, without PyTorch; x stays on the GPU between the steps."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from typing import TYPE_CHECKING

from admtrt.contract import PRECISIONS
from admtrt.errors import EngineError, PlanError, RequestError
from admtrt.runtime.backends.backend import Backend
from admtrt.runtime.backends.graphs import GraphDenoiser, batch_of
from admtrt.runtime.cuda import CudaDevice, at_exit
from admtrt.runtime.engines.library import find_libraries
from admtrt.runtime.engines.match import usable_plans
from admtrt.runtime.engines.plans import PlanStore
from admtrt.runtime.engines.sources import graph_source
from admtrt.runtime.trt.batch_buffers import BatchBuffers
from admtrt.runtime.trt.engine import Engine
from admtrt.runtime.trt.held import HeldOnDevice
from admtrt.runtime.trt.kernels import KernelCache

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from admtrt.bundle import Bundle
    from admtrt.contract import GraphName, Precision
    from admtrt.runtime.backends.choice import BackendChoice
    from admtrt.runtime.engines.device import Gpu
    from admtrt.runtime.engines.library import Library
    from admtrt.runtime.engines.plans import PlanRecord
    from admtrt.runtime.engines.sources import GraphSource
    from admtrt.runtime.slots import Array, Slots

    Sources = Mapping[GraphName, GraphSource]

_MOST_SETS = 1000  # combinations of plans tried in search of a common batch size
_SHARED = 2  # unprepared batch sizes to keep: a run has full batches and a remainder


class TensorRTDenoiser(GraphDenoiser):
    """A bundle's plans as a :class:`~admtrt.runtime.sampler.ResidentDenoiser`.

    For each graph, it uses the newest plan that fits the graph's file, the library's version and the GPU. If
    both libraries have plans, it takes TensorRT's.

    Args:
        bundle: a verified bundle.
        precision: of the plans.
        plans: folder of the plans; None for the bundle's own.

    Attributes:
        library: the library that runs the plans.
        gpu: the GPU that they run on.
        device: that GPU, opened.
        engines: the open plans by graph; empty once closed.
        kernels: kernel caches of TensorRT-RTX by graph; empty with TensorRT.
        buffers: by batch size, the most recently used last.

    Raises:
        MissingDependencyError: if neither library, or cuda-core, is installed.
        BundleError: if the bundle has no graphs in that precision.
        EngineError: without a usable GPU or driver, or if the GPU has no room for the weights.
        PlanError: if a plan is missing, damaged, came with the bundle or was made for something else.
    """

    any_size = False

    def __init__(
        self,
        bundle: Bundle,
        precision: Precision = "fp32",
        *,
        plans: Path | None = None,
    ) -> None:
        self._sources: Sources = {
            graph: graph_source(bundle, graph, precision) for graph in bundle.manifest.sampled_graphs
        }
        libraries = find_libraries()
        self.device = CudaDevice()  # first: the libraries crash without a driver
        self.gpu: Gpu = self.device.gpu
        store = PlanStore.of(bundle, plans)
        self.library, records = _choose(store, self._sources, libraries, self.gpu)
        self.kernels: dict[GraphName, KernelCache] = {}
        self.engines: dict[GraphName, Engine] = {}
        for graph, record in records.items():
            if self.library.flavor == "rtx":
                name = f"{record.key.digest}-sm{self.gpu.compute_capability}.kernels"
                self.kernels[graph] = KernelCache(store, name)
            self.engines[graph] = Engine(
                self.library,
                self.device,
                store.load(record),
                self._sources[graph],
                record.key,
                build=store.rebuild_command(record.key),
                kernels=self.kernels.get(graph),
            )
        if not any(self._fits(size) for size in self._sizes()):
            raise PlanError(
                "the plans of the graphs have no batch size in common",
                hint="Build them together: admtrt build BUNDLE --batch 1:4:16",
            )
        self.specs = {graph: source.spec for graph, source in self._sources.items()}
        self.buffers: dict[int, BatchBuffers] = {}
        self._prepared: set[int] = set()
        self._held = False
        self._closing = weakref.finalize(
            self, _close_at_last, self.device, self.buffers, self.engines, self.kernels
        )

    def __str__(self) -> str:
        faults = [each.capture_fault for each in self.buffers.values() if each.capture_fault]
        graphs = f"no CUDA graphs ({faults[0]})" if faults else "one CUDA graph a step"
        if self.library.flavor == "rtx":
            graphs = "CUDA graphs of its own"
        return f"{self.library} on {self.gpu}, {graphs}"

    @property
    def largest_batch(self) -> int:
        """The largest batch that every plan takes."""
        return max(size for size in self._sizes() if self._fits(size))

    @contextlib.contextmanager
    def hold(self, slots: Slots) -> Iterator[HeldOnDevice]:
        """See :class:`~admtrt.runtime.sampler.ResidentDenoiser`.

        Raises:
            RequestError: if there are more slots than the largest batch.
            EngineError: if the GPU has no room for them, or the library refuses.
        """
        buffers = self.buffers_for(len(slots))
        self._held = True
        try:
            with HeldOnDevice(slots, self.device, buffers) as held:
                yield held
        finally:
            self._held = False
        self._keep_kernels()

    def _run(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        count = batch_of(feeds)
        outputs = self.buffers_for(count).run(graph, feeds, count)
        self._keep_kernels()
        return outputs

    def prepare(self, sizes: Mapping[GraphName, Sequence[int]]) -> None:
        """See :meth:`GraphDenoiser.prepare`.

        A step of held slots runs every graph at the UNet's batch size, padded to a size that the plans take.
        Where only some samples are guided, the gradient runs at its own sizes.
        """
        self._activate()
        self._prepared = {self._padded(size) for size in sizes.get("unet", ())}
        for batch in self.buffers.keys() - self._prepared:
            self.buffers.pop(batch).close()
        for batch in sorted(self._prepared):
            self.buffers_for(batch).prepare_gradients(sizes.get("classifier_gradient", ()))
        self._keep_kernels()

    def check_batch(self, batch: int) -> None:
        """Refuse a batch that is larger than the plans take.

        Raises:
            RequestError: naming the largest.
        """
        self._padded(batch)

    def close(self) -> None:
        """Release the GPU's memory. This also happens when the process ends.

        Raises:
            EngineError: if the GPU has failed; everything that can be released is released first.
        """
        if self._closing.detach() is not None:
            _close(self.device, self.buffers, self.engines, self.kernels)

    def __exit__(self, *fault: object) -> None:
        at_exit(self.close)(*fault)

    def _activate(self) -> None:
        if self._held:
            raise RuntimeError("the GPU's memory is taken by slots that are held")
        if not self.engines:
            raise RuntimeError("this backend was closed")
        self.device.activate()

    def buffers_for(self, count: int) -> BatchBuffers:
        """The buffers of the smallest batch that holds ``count`` samples, made if necessary.

        Raises:
            RequestError: if the plans take fewer samples.
            EngineError: if the GPU has no room for them.
        """
        self._activate()
        batch = self._padded(count)
        buffers = self.buffers.pop(batch, None)
        if buffers is None:
            sharing = [size for size in self.buffers if size not in self._prepared]
            if len(sharing) >= _SHARED and batch not in self._prepared:
                self.buffers.pop(sharing[0]).close()
            capture = self.library.flavor != "rtx"
            buffers = BatchBuffers(self.device, self.engines, self._sources, batch, capture=capture)
        self.buffers[batch] = buffers  # the dictionary is ordered by use
        return buffers

    def _padded(self, count: int) -> int:
        """The smallest batch of at least ``count`` samples that every plan takes."""
        fitting = [size for size in (count, *self._sizes()) if size >= count and self._fits(size)]
        if not fitting:
            raise RequestError(
                f"a batch of {count} is larger than the largest that the plans take, {self.largest_batch}",
                hint=f"Use a batch of {self.largest_batch} at most, or build plans with a larger --batch.",
            )
        return min(fitting)

    def _sizes(self) -> list[int]:
        """All ends of the plans' profiles: the ranges of common sizes begin and end at them, too."""
        profiles = [profile for engine in self.engines.values() for profile in engine.profiles]
        return [size for profile in profiles for size in (profile.smallest, profile.largest)]

    def _fits(self, batch: int) -> bool:
        return all(engine.profile(batch) is not None for engine in self.engines.values())

    def _keep_kernels(self) -> None:
        fresh = [each for each in self.buffers.values() if each.fresh]
        for kernels in self.kernels.values() if fresh else ():
            kernels.keep()
        for each in fresh:
            each.fresh = False


def _close(
    device: CudaDevice,
    buffers: dict[int, BatchBuffers],
    engines: dict[GraphName, Engine],
    kernels: dict[GraphName, KernelCache],
) -> None:
    with contextlib.ExitStack() as stack:
        stack.callback(engines.clear)  # runs last, and frees the weights
        for each in buffers.values():
            stack.push(at_exit(each.close))
        stack.callback(buffers.clear)
        device.activate()  # another thread may drop the last reference
        for cache in kernels.values():
            cache.keep()


def _close_at_last(
    device: CudaDevice,
    buffers: dict[int, BatchBuffers],
    engines: dict[GraphName, Engine],
    kernels: dict[GraphName, KernelCache],
) -> None:
    """Close without raising: nobody could handle an error now, and earlier calls have reported theirs."""
    with contextlib.suppress(Exception):
        _close(device, buffers, engines, kernels)


def _choose(
    store: PlanStore, sources: Sources, libraries: list[Library], gpu: Gpu
) -> tuple[Library, dict[GraphName, PlanRecord]]:
    """The first library with plans of every graph, and its newest plans that share a batch size."""
    faults = []
    for library in libraries:
        try:
            usable = [usable_plans(store, source, library, gpu) for source in sources.values()]
        except EngineError as error:
            faults.append(error)
            continue
        # The newest plans come first; the error names them if no combination fits.
        sets = list(itertools.islice(itertools.product(*usable), _MOST_SETS))
        chosen = next(filter(_have_a_common_batch, sets), sets[0])
        return library, dict(zip(sources, chosen, strict=True))
    raise faults[0]


def _have_a_common_batch(records: Sequence[PlanRecord]) -> bool:
    profiles = [record.key.options.profiles for record in records]
    return any(
        all(any(one.smallest <= size <= one.largest for one in of_plan) for of_plan in profiles)
        for size in {one.smallest for of_plan in profiles for one in of_plan}
    )


def _open(bundle: Bundle, choice: BackendChoice, _: Collection[GraphName] | None) -> GraphDenoiser:
    return TensorRTDenoiser(bundle, choice.precision, plans=choice.plans)


BACKENDS = (
    Backend(
        "tensorrt",
        "engines of admtrt build, on TensorRT or TensorRT-RTX",
        PRECISIONS,
        "tensorrt or rtx",
        (("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"), ("cuda.core",)),
        _open,
        distributions=("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx-cu13", "cuda-core"),
        device="cuda",
        exact=False,
        runs_plans=True,
    ),
)
