"""The arrays, contexts, streams and CUDA graphs that one batch size needs on the GPU."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from admtrt.contract import CLASSIFIER_GRADIENT
from admtrt.runtime.cuda import at_exit
from admtrt.runtime.sampler import gathered_size
from admtrt.schedule.edits import EDIT_GRAPHS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from admtrt.contract import GraphName, TensorSpec
    from admtrt.runtime.cuda import CudaDevice, DeviceArray, Graph, PinnedArray
    from admtrt.runtime.engines.sources import GraphSource
    from admtrt.runtime.trt.engine import Binding, Engine

    Key = str | tuple[str, str]
    """Of an array: a name that all graphs share, or a graph and its own tensor."""

    Update = tuple[bool, bool, tuple[GraphName, ...]]
    """Work of a step behind the networks: fields of :class:`StepKind`."""

    Piece = tuple[int | None, Update | None]
    """Of a step: how many samples the gradient runs for beside the UNet, and what comes behind, or None."""

GATHERED = "gathered"
"""Stands for the graph in the keys of the gradient's tensors that hold only the guided samples' rows."""

_ONE_FOR_ALL = (
    "x", "t", "out", "grad", "noise", "saved", "h1", "h2", "r", "x_prev", "pred_x0", "saved_next",
    "noise2", "x_edited",
)  # fmt: skip
_WITH_ROWS: tuple[GraphName, ...] = ("update", "update_full", *EDIT_GRAPHS)
_SHARED = 2  # contexts for gathered rows of unprepared sizes
_SAME_ROW: dict[GraphName, GraphName] = {"threshold": "update_full"}
"""Graphs that share the coefficients of another graph."""


class StepKind(NamedTuple):
    """The graphs that a step runs besides the UNet.

    Attributes:
        gradient: batch size of the classifier's gradient; 0 if it does not run.
        full: ``update_full`` with the solvers' memory in place of ``update``.
        dynamic: run ``threshold`` before the update; otherwise the thresholds come from the host.
        edits: the graphs that edit x_prev, in order.
    """

    gradient: int
    full: bool
    dynamic: bool
    edits: tuple[GraphName, ...] = ()

    @property
    def update(self) -> Update:
        """The same kind without the gradient."""
        return (self.full, self.dynamic, self.edits)


class BatchBuffers:
    """Runs steps of one batch size.

    A step runs the classifier's gradient on a second stream beside the UNet, then the update and the edits.
    It copies x_prev to x, and the solvers' memory to where the next step reads it. From the second step of a
    kind on, it is a CUDA graph; if the library cannot be captured, the work is enqueued every time.

    If only some samples are guided, their rows of x are gathered before the networks run, and the rows of
    their gradient scattered afterwards; all other rows of the gradient are zeros. These copies, one per run
    of neighbouring rows, lie outside the two CUDA graphs, so that one pair of graphs serves any rows of that
    number.

    Args:
        device: the GPU, which has to be the current device.
        engines: by graph.
        sources: the graphs that the engines were built from.
        batch: the batch size, which lies in a profile of every engine.
        capture: whether steps become CUDA graphs here; TensorRT-RTX makes its own.

    Attributes:
        batch: as given.
        main: the stream of the update and of every copy.
        arrays: the arrays on the GPU, by content.
        gradients: the gradient bound to gathered rows, by the number of rows.
        graphs: captured parts of steps.
        fresh: whether contexts were created, and thus kernels compiled, since the owner set it to False.
        capture_fault: why steps could not be captured; empty if all captures succeeded.

    Raises:
        EngineError: if the GPU has no room, or the library refuses.
    """

    def __init__(
        self,
        device: CudaDevice,
        engines: Mapping[GraphName, Engine],
        sources: Mapping[GraphName, GraphSource],
        batch: int,
        *,
        capture: bool,
    ) -> None:
        self.batch = batch
        self.capture_fault = ""
        self.fresh = True
        self._may_capture = capture
        self._device = device
        self._engines = engines
        self._sources = sources
        self.graphs: dict[Piece, Graph] = {}
        self._warm: set[Piece] = set()
        self._staging: dict[Key, PinnedArray] = {}
        self.arrays: dict[Key, DeviceArray] = {}
        self._bindings: dict[GraphName, Binding] = {}
        self.gradients: dict[int, Binding] = {}
        self._prepared: set[int] = set()  # sizes of gradients that were prepared
        with ExitStack() as stack:
            self.main = stack.enter_context(device.stream())
            self._side = stack.enter_context(device.stream())
            self._forked = stack.enter_context(device.event())
            self._joined = stack.enter_context(device.event())
            tensors = [
                (_key(graph, tensor), tensor)
                for graph, source in sources.items()
                for tensor in (*source.spec.inputs, *source.spec.outputs)
            ]
            if CLASSIFIER_GRADIENT in sources:
                spec = sources[CLASSIFIER_GRADIENT].spec
                tensors += [((GATHERED, each.name), each) for each in (*spec.inputs, *spec.outputs)]
            for key, tensor in tensors:
                if key not in self.arrays:
                    array = stack.enter_context(device.array(tensor.sized(batch), tensor.dtype, self.main))
                    array.clear(self.main)  # unwritten values must at least be finite
                    self.arrays[key] = array
            self._led = [key for key in self.arrays if isinstance(key, tuple) and "." in key[1]]
            for bindings in (self._bindings, self.gradients):
                stack.callback(bindings.clear)
            stack.push(at_exit(self._close_graphs))
            for graph in engines:
                self._bindings[graph] = self._bound(graph, batch)
            self._stack = stack.pop_all()

    @property
    def step_inputs(self) -> list[Key]:
        """The arrays that the host fills for a step, whatever its kind."""
        rows = [coefficients_of(graph) for graph in _WITH_ROWS]
        fed: list[Key] = ["t", "noise", "noise2", "r", *rows]
        if CLASSIFIER_GRADIENT in self._sources:
            fed += [
                (GATHERED, each.name)
                for each in self._sources[CLASSIFIER_GRADIENT].spec.inputs
                if each.name != "x"
            ]
        return [key for key in fed if key in self.arrays]

    def pinned(self, key: Key) -> PinnedArray:
        """New pinned memory with the size of an array. The caller closes it."""
        array = self.arrays[key]
        return self._device.pinned(array.shape, array.dtype)

    def send(self, key: Key, source: PinnedArray) -> None:
        """Enqueue a copy from host memory to an array."""
        self.arrays[key].copy_from(source, self.main)

    def upload(self, arrays: Mapping[Key, NDArray[Any]]) -> None:
        """Copy rows to arrays; missing rows are copies of the last. Waits."""
        for key, rows in arrays.items():
            staged = self._staged(key)
            fill_rows(staged.array, rows)
            self.send(key, staged)
        self.main.sync()

    def download(self, keys: Sequence[Key], count: int) -> list[NDArray[Any]]:
        """Copy the first ``count`` rows of arrays to the host. Waits."""
        staged = [self._staged(key) for key in keys]
        for key, pinned in zip(keys, staged, strict=True):
            pinned.copy_from(self.arrays[key], self.main)
        self.main.sync()
        return [pinned.array[:count].copy() for pinned in staged]

    def run(self, graph: GraphName, feeds: Mapping[str, NDArray[Any]], count: int) -> dict[str, NDArray[Any]]:
        """Run one graph on host arrays of ``count`` rows by name; every output by name. Waits."""
        spec = self._sources[graph].spec
        self.upload({_key(graph, tensor): feeds[tensor.name] for tensor in spec.inputs})
        self._bindings[graph].enqueue(self.main)
        outputs = self.download([_key(graph, tensor) for tensor in spec.outputs], count)
        return dict(zip([tensor.name for tensor in spec.outputs], outputs, strict=True))

    def gradient_size(self, count: int) -> int:
        """The batch size of the gradient if ``count`` samples are guided: one of a few sizes, or all."""
        engine = self._engines[CLASSIFIER_GRADIENT]
        least = gathered_size(count, self.batch)
        sizes = (least, *(profile.smallest for profile in engine.profiles))
        fitting = [size for size in sizes if size >= least and engine.profile(size) is not None]
        return min([*fitting, self.batch])

    def prepare_gradients(self, counts: Sequence[int]) -> None:
        """Bind the gradient for these numbers of guided samples, keep those and drop all others.

        Raises:
            EngineError: if the GPU has no room, or the library refuses.
        """
        sizes = {self.gradient_size(count) for count in counts if 0 < count < self.batch} - {self.batch}
        self._prepared = sizes
        for size in self.gradients.keys() - sizes:
            self._drop_gradient(size)
        for size in sorted(sizes):
            self._bind_gradient(size)

    def step(self, kind: StepKind, guided: NDArray[np.int64] | None = None) -> None:
        """Enqueue one step of all samples, x to x.

        Args:
            kind: the graphs that it runs.
            guided: int64 [n], the guided rows in order, if only some are guided. Then ``kind.gradient`` is
                their :meth:`gradient_size`, and the gradient's inputs other than x have been sent.

        Raises:
            EngineError: if the library refuses.
        """
        if guided is None:
            self._launch((kind.gradient, kind.update))
            return
        x, grad = self.arrays["x"], self.arrays["grad"]
        if kind.gradient == self.batch:
            self._launch((kind.gradient, None))
            for first, count in _runs(np.setdiff1d(np.arange(self.batch), guided)):
                grad.rows(first, count).clear(self.main)
        else:
            self._bind_gradient(kind.gradient)
            gathered_x, gathered = self.arrays[GATHERED, "x"], self.arrays[GATHERED, "grad"]
            runs = _runs(guided)
            places = np.cumsum([0, *(count for _, count in runs)]).tolist()
            for place, (first, count) in zip(places, runs, strict=False):
                gathered_x.rows(place, count).copy_from(x.rows(first, count), self.main)
            self._launch((kind.gradient, None))
            grad.clear(self.main)
            for place, (first, count) in zip(places, runs, strict=False):
                grad.rows(first, count).copy_from(gathered.rows(place, count), self.main)
        self._launch((None, kind.update))

    def _launch(self, piece: Piece) -> None:
        if self._may_capture and piece in self._warm and piece not in self.graphs:
            self._capture(piece)
        if piece in self.graphs:
            self.graphs[piece].launch(self.main)
        else:
            self._enqueue(piece)
            self._warm.add(piece)  # the library's preparations at a first run cannot be captured

    def _enqueue(self, piece: Piece) -> None:
        gradient, update = piece
        if gradient is not None:
            self._enqueue_networks(gradient)
        if update is not None:
            self._enqueue_update(*update)

    def _enqueue_networks(self, gradient: int) -> None:
        main, side = self.main, self._side
        if gradient:
            binding = (
                self._bindings[CLASSIFIER_GRADIENT] if gradient == self.batch else self.gradients[gradient]
            )
            main.record(self._forked)
            side.wait(self._forked)
            binding.enqueue(side)
            side.record(self._joined)
        else:
            self.arrays["grad"].clear(main)  # 0 * inf is NaN: clear a stale gradient
        self._bindings["unet"].enqueue(main)
        if gradient:
            main.wait(self._joined)

    def _enqueue_update(self, full: bool, dynamic: bool, edits: tuple[GraphName, ...]) -> None:
        arrays, main = self.arrays, self.main
        if full:
            for key in self._led:  # an earlier run may have left guides' tensors
                arrays[key].clear(main)
        if dynamic:
            self._bindings["threshold"].enqueue(main)
        self._bindings["update_full" if full else "update"].enqueue(main)
        for graph in edits:
            self._bindings[graph].enqueue(main)
            arrays["x_prev"].copy_from(arrays["x_edited"], main)
        arrays["x"].copy_from(arrays["x_prev"], main)
        if full:
            for target, source in (("h2", "h1"), ("h1", "pred_x0"), ("saved", "saved_next")):
                arrays[target].copy_from(arrays[source], main)

    def _capture(self, piece: Piece) -> None:
        self.main.sync()
        try:
            self.graphs[piece] = self.main.capture(lambda: self._enqueue(piece))
        except Exception as error:  # without a capture the step still runs
            self._may_capture, self.capture_fault = False, str(error) or type(error).__name__

    def _bound(self, graph: GraphName, batch: int, *, gathered: bool = False) -> Binding:
        spec = self._sources[graph].spec
        addresses = {
            tensor.name: self.arrays[(GATHERED, tensor.name) if gathered else _key(graph, tensor)].address
            for tensor in (*spec.inputs, *spec.outputs)
        }
        return self._engines[graph].bind(batch, addresses, self.main)

    def _bind_gradient(self, size: int) -> None:
        """A context for the gradient of ``size`` gathered rows. Two unprepared sizes are kept."""
        binding = self.gradients.pop(size, None)
        if binding is None:
            sharing = [other for other in self.gradients if other not in self._prepared]
            if len(sharing) >= _SHARED and size not in self._prepared:
                self._drop_gradient(sharing[0])
            binding = self._bound(CLASSIFIER_GRADIENT, size, gathered=True)
            self.fresh = True
        self.gradients[size] = binding  # the dictionary is ordered by use

    def _drop_gradient(self, size: int) -> None:
        self.sync()
        piece: Piece = (size, None)
        self._warm.discard(piece)
        if piece in self.graphs:
            self.graphs.pop(piece).close()
        del self.gradients[size]

    def _close_graphs(self) -> None:
        with ExitStack() as stack:
            for graph in self.graphs.values():
                stack.push(graph)
            self.graphs.clear()

    def _staged(self, key: Key) -> PinnedArray:
        if key not in self._staging:
            self._staging[key] = self._stack.enter_context(self.pinned(key))
        return self._staging[key]

    def sync(self) -> None:
        """Wait for everything enqueued, complete or cut off by an error."""
        self._side.sync()
        self.main.sync()

    def close(self) -> None:
        """Wait for the device and release everything, also if the device has failed."""
        with self._stack:
            self.sync()


def fill_rows(target: NDArray[Any], rows: NDArray[Any]) -> None:
    """Copy rows into an array that may have more rows; copies of the last row are finite if it is."""
    target[: len(rows)] = rows
    target[len(rows) :] = rows[-1:]


def coefficients_of(graph: GraphName) -> Key:
    """The key, in ``arrays``, of a graph's coefficients."""
    return (_SAME_ROW.get(graph, graph), "coefficients")


def _key(graph: GraphName, tensor: TensorSpec) -> Key:
    if tensor.name == "coefficients":
        return coefficients_of(graph)
    return tensor.name if tensor.name in _ONE_FOR_ALL else (graph, tensor.name)


def _runs(rows: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Start and length of each run of consecutive numbers."""
    parts = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1) if len(rows) else []
    return [(int(part[0]), len(part)) for part in parts]
