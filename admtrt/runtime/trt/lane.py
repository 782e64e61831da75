"""Everything that one batch size needs on the GPU, bound once: arrays, contexts, streams, CUDA graphs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from admtrt.contract import GraphName, TensorSpec
    from admtrt.runtime.cuda import CudaDevice, DeviceArray, Graph, PinnedArray
    from admtrt.runtime.engines.sources import GraphSource
    from admtrt.runtime.trt.engine import Binding, Engine

GUIDE_Y = "guide_y"
"""The classifier's ``y``, which is not the UNet's; every other tensor has one array, whoever uses it."""


class Lane:
    """One batch size.

    A step runs the classifier's gradient on a stream of its own beside the UNet, then the update, and puts
    x_prev where x was. From the second step of a kind on it is one CUDA graph; where the library cannot be
    captured, its work is enqueued every time.

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
        self._graphs: dict[bool, Graph] = {}
        self._warm: set[bool] = set()
        self._staging: dict[str, PinnedArray] = {}
        self._arrays: dict[str, DeviceArray] = {}
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
            stack.callback(self._bindings.clear)
            for graph, engine in engines.items():
                spec = sources[graph].spec
                addresses = {
                    tensor.name: self._arrays[_key(graph, tensor)].address
                    for tensor in (*spec.inputs, *spec.outputs)
                }
                self._bindings[graph] = engine.bind(batch, addresses, self.main)
            self._stack = stack.pop_all()

    def pinned(self, key: str) -> PinnedArray:
        """New host memory for an array of the lane, for the caller to give back."""
        array = self._arrays[key]
        return self._device.pinned(array.shape, array.dtype)

    def send(self, key: str, source: PinnedArray) -> None:
        """Enqueue filling an array from host memory."""
        self._arrays[key].copy_from(source, self.main)

    def upload(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Fill arrays by the rows of others, which may be fewer: the last row fills up. Waits."""
        for key, rows in arrays.items():
            staged = self._staged(key)
            fill_rows(staged.array, rows)
            self.send(key, staged)
        self.main.sync()

    def download(self, keys: Sequence[str], count: int) -> list[NDArray[Any]]:
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

    def step(self, *, guided: bool) -> None:
        """Enqueue one step of all samples, x to x.

        Raises:
            EngineError: if the library refuses.
        """
        if self._may_capture and guided in self._warm and guided not in self._graphs:
            self._capture(guided=guided)
        if guided in self._graphs:
            self._graphs[guided].launch(self.main)
        else:
            self._enqueue(guided=guided)
            self._warm.add(guided)  # what the library prepares at a first run cannot be captured

    def _enqueue(self, *, guided: bool) -> None:
        arrays, main = self._arrays, self.main
        if guided:
            main.record(self._forked)
            self._side.wait(self._forked)
            self._bindings["classifier_gradient"].enqueue(self._side)
            self._side.record(self._joined)
        else:
            arrays["grad"].clear(main)  # an old gradient times a weight of 0 is no 0 where it overflowed
        self._bindings["unet"].enqueue(main)
        if guided:
            main.wait(self._joined)
        self._bindings["update"].enqueue(main)
        arrays["x"].copy_from(arrays["x_prev"], main)

    def _capture(self, *, guided: bool) -> None:
        self.main.sync()
        try:
            graph = self.main.capture(lambda: self._enqueue(guided=guided))
        except Exception as error:  # whatever cannot be captured still runs
            self._may_capture, self.capture_fault = False, str(error) or type(error).__name__
            return
        self._graphs[guided] = self._stack.enter_context(graph)

    def _staged(self, key: str) -> PinnedArray:
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


def _key(graph: GraphName, tensor: TensorSpec) -> str:
    return GUIDE_Y if (graph, tensor.name) == ("classifier_gradient", "y") else tensor.name
