"""Everything that one batch size needs on the GPU, bound once: arrays, contexts, streams, CUDA graphs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from admtrt.schedule.edits import EDIT_GRAPHS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from admtrt.contract import GraphName, TensorSpec
    from admtrt.runtime.cuda import CudaDevice, DeviceArray, Graph, PinnedArray
    from admtrt.runtime.engines.sources import GraphSource
    from admtrt.runtime.trt.engine import Binding, Engine

    Key = str | tuple[GraphName, str]
    """Of an array: a name that all graphs share, or a graph and its own tensor."""

_ONE_FOR_ALL = (
    "x", "t", "out", "grad", "noise", "saved", "h1", "h2", "r", "x_prev", "pred_x0", "saved_next",
    "noise2", "x_edited",
)  # fmt: skip
_WITH_ROWS: tuple[GraphName, ...] = ("update", "update_full", *EDIT_GRAPHS)
_SAME_ROW: dict[GraphName, GraphName] = {"threshold": "update_full"}
"""Graphs that take the coefficients of another."""


class StepKind(NamedTuple):
    """What a step runs besides the UNet.

    Attributes:
        guided: the classifier's gradient.
        full: ``update_full`` with the solvers' memory in place of ``update``.
        dynamic: ``threshold`` before it; else the thresholds are those that were sent.
        edits: the graphs that edit x_prev, in order.
    """

    guided: bool
    full: bool
    dynamic: bool
    edits: tuple[GraphName, ...] = ()


class Lane:
    """One batch size.

    A step runs the classifier's gradient on a stream of its own beside the UNet, then the update and the
    edits, and puts x_prev where x was and the memory where it is read. From the second step of a kind on it
    is a CUDA graph; where the library cannot be captured, its work is enqueued every time.

    Args:
        device: the GPU, which has to be the current one.
        engines: by graph.
        sources: what they were built from.
        batch: held by a profile of every engine.
        capture: whether steps become CUDA graphs here; TensorRT-RTX makes its own.

    Attributes:
        batch: as given.
        main: the stream of the update and of every copy.
        capture_fault: why steps could not be captured; empty where none was tried or all succeeded.

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
        self._may_capture = capture
        self._device = device
        self._sources = sources
        self._graphs: dict[StepKind, Graph] = {}
        self._warm: set[StepKind] = set()
        self._staging: dict[Key, PinnedArray] = {}
        self._arrays: dict[Key, DeviceArray] = {}
        self._bindings: dict[GraphName, Binding] = {}
        with ExitStack() as stack:
            self.main = stack.enter_context(device.stream())
            self._side = stack.enter_context(device.stream())
            self._forked = stack.enter_context(device.event())
            self._joined = stack.enter_context(device.event())
            for graph, source in sources.items():
                for tensor in (*source.spec.inputs, *source.spec.outputs):
                    key = _key(graph, tensor)
                    if key not in self._arrays:
                        array = stack.enter_context(
                            device.array(tensor.sized(batch), tensor.dtype, self.main)
                        )
                        array.clear(self.main)  # what was never written must at least be finite
                        self._arrays[key] = array
            self._led = [key for key in self._arrays if isinstance(key, tuple) and "." in key[1]]
            stack.callback(self._bindings.clear)
            for graph, engine in engines.items():
                spec = sources[graph].spec
                addresses = {
                    tensor.name: self._arrays[_key(graph, tensor)].address
                    for tensor in (*spec.inputs, *spec.outputs)
                }
                self._bindings[graph] = engine.bind(batch, addresses, self.main)
            self._stack = stack.pop_all()

    @property
    def step_inputs(self) -> list[Key]:
        """The arrays that a step is fed from the host, whatever its kind."""
        rows = [coefficients_of(graph) for graph in _WITH_ROWS]
        fed: list[Key] = ["t", "noise", "noise2", "r", *rows]
        return [key for key in fed if key in self._arrays]

    def pinned(self, key: Key) -> PinnedArray:
        """New host memory for an array of the lane, for the caller to give back."""
        array = self._arrays[key]
        return self._device.pinned(array.shape, array.dtype)

    def send(self, key: Key, source: PinnedArray) -> None:
        """Enqueue filling an array from host memory."""
        self._arrays[key].copy_from(source, self.main)

    def upload(self, arrays: Mapping[Key, NDArray[Any]]) -> None:
        """Fill arrays by the rows of others, which may be fewer: the last row fills up. Waits."""
        for key, rows in arrays.items():
            staged = self._staged(key)
            fill_rows(staged.array, rows)
            self.send(key, staged)
        self.main.sync()

    def download(self, keys: Sequence[Key], count: int) -> list[NDArray[Any]]:
        """The first ``count`` rows of arrays, as new ones. Waits."""
        staged = [self._staged(key) for key in keys]
        for key, pinned in zip(keys, staged, strict=True):
            pinned.copy_from(self._arrays[key], self.main)
        self.main.sync()
        return [pinned.array[:count].copy() for pinned in staged]

    def run(self, graph: GraphName, feeds: Mapping[str, NDArray[Any]], count: int) -> dict[str, NDArray[Any]]:
        """Run one graph on host arrays of ``count`` rows by name; every output by name. Waits."""
        spec = self._sources[graph].spec
        self.upload({_key(graph, tensor): feeds[tensor.name] for tensor in spec.inputs})
        self._bindings[graph].enqueue(self.main)
        outputs = self.download([_key(graph, tensor) for tensor in spec.outputs], count)
        return dict(zip([tensor.name for tensor in spec.outputs], outputs, strict=True))

    def step(self, kind: StepKind) -> None:
        """Enqueue one step of all samples, x to x.

        Raises:
            EngineError: if the library refuses.
        """
        if self._may_capture and kind in self._warm and kind not in self._graphs:
            self._capture(kind)
        if kind in self._graphs:
            self._graphs[kind].launch(self.main)
        else:
            self._enqueue(kind)
            self._warm.add(kind)  # what the library prepares at a first run cannot be captured

    def _enqueue(self, kind: StepKind) -> None:
        arrays, main = self._arrays, self.main
        if kind.guided:
            main.record(self._forked)
            self._side.wait(self._forked)
            self._bindings["classifier_gradient"].enqueue(self._side)
            self._side.record(self._joined)
        else:
            arrays["grad"].clear(main)  # 0 * inf is NaN: clear a stale gradient
        self._bindings["unet"].enqueue(main)
        if kind.guided:
            main.wait(self._joined)
        if kind.full:
            for key in self._led:  # tensors of guides, which an earlier run of a graph may have left
                arrays[key].clear(main)
        if kind.dynamic:
            self._bindings["threshold"].enqueue(main)
        self._bindings["update_full" if kind.full else "update"].enqueue(main)
        for graph in kind.edits:
            self._bindings[graph].enqueue(main)
            arrays["x_prev"].copy_from(arrays["x_edited"], main)
        arrays["x"].copy_from(arrays["x_prev"], main)
        if kind.full:
            for target, source in (("h2", "h1"), ("h1", "pred_x0"), ("saved", "saved_next")):
                arrays[target].copy_from(arrays[source], main)

    def _capture(self, kind: StepKind) -> None:
        self.main.sync()
        try:
            graph = self.main.capture(lambda: self._enqueue(kind))
        except Exception as error:  # whatever cannot be captured still runs
            self._may_capture, self.capture_fault = False, str(error) or type(error).__name__
            return
        self._graphs[kind] = self._stack.enter_context(graph)

    def _staged(self, key: Key) -> PinnedArray:
        if key not in self._staging:
            self._staging[key] = self._stack.enter_context(self.pinned(key))
        return self._staging[key]

    def sync(self) -> None:
        """Wait for everything that was enqueued, be it complete or cut off by a fault."""
        self._side.sync()
        self.main.sync()

    def close(self) -> None:
        """Give everything back, once the device has done what was enqueued; also where it has failed."""
        with self._stack:
            self.sync()


def fill_rows(target: NDArray[Any], rows: NDArray[Any]) -> None:
    """Copy rows into an array that may have more of them; copies of the last row are as healthy as it is."""
    target[: len(rows)] = rows
    target[len(rows) :] = rows[-1:]


def coefficients_of(graph: GraphName) -> Key:
    """Key of the coefficients that a graph takes."""
    return (_SAME_ROW.get(graph, graph), "coefficients")


def _key(graph: GraphName, tensor: TensorSpec) -> Key:
    if tensor.name == "coefficients":
        return coefficients_of(graph)
    return tensor.name if tensor.name in _ONE_FOR_ALL else (graph, tensor.name)
