"""A thin layer over cuda-core: one GPU's memory, streams, events and graphs, each a context manager.

Only methods named ``sync`` wait for the device. A :class:`CudaDevice` and the objects it made belong to the
thread that last called :meth:`CudaDevice.activate`. A CUDA error, also one of work enqueued earlier, is
raised as an :class:`~admtrt.errors.EngineError` by the method that receives it.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import re
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from admtrt.errors import EngineError, MissingDependencyError
from admtrt.runtime.engines.device import query_driver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import DTypeLike, NDArray

    from admtrt.runtime.engines.device import Gpu

USED = (
    "Buffer.close",
    "Buffer.copy_from",
    "Buffer.fill",
    "Buffer.from_handle",
    "Buffer.handle",
    "Buffer.size",
    "Device.allocate",
    "Device.create_event",
    "Device.create_stream",
    "Device.set_current",
    "Event.close",
    "Event.sync",
    "EventOptions.blocking_sync",
    "LegacyPinnedMemoryResource.allocate",
    "Stream.close",
    "Stream.handle",
    "Stream.record",
    "Stream.sync",
    "Stream.wait",
)
"""Every member of ``cuda.core`` that is used here; a test checks the list."""

USED_OF_DRIVER = (
    "CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiate",
    "cuGraphLaunch",
    "cuGraphUpload",
    "cuMemGetInfo",
    "cuStreamBeginCapture",
    "cuStreamEndCapture",
)
"""The same for ``cuda.bindings.driver``."""

_OUT_OF_MEMORY = "OUT_OF_MEMORY"  # part of the driver's error name
_FULL = "Use a smaller --batch-size, or end other programs on the GPU."
_HINT = "Use a CPU backend, or see what this machine lacks with: admtrt doctor"
# Sticky errors: after them, every further CUDA call of the process fails.
_FATAL = re.compile(
    r"ILLEGAL_(ADDRESS|INSTRUCTION)|MISALIGNED|INVALID_(ADDRESS_SPACE|PC)|LAUNCH_(FAILED|TIMEOUT)"
    r"|HARDWARE_STACK|ASSERT|ECC|CONTAINED|LEAK"
)
_AFRESH = (
    "The GPU serves this process no more: start the command again; if it fails again, use another backend."
)


def at_exit(close: Callable[[], object]) -> Callable[..., None]:
    """Wrap ``close`` for :meth:`contextlib.ExitStack.push`: its error never replaces one already raised.

    An error during cleanup is most often the consequence of the earlier error.
    """

    def leave(_: object, error: BaseException | None, __: object) -> None:
        try:
            close()
        except Exception:
            if error is None:
                raise

    return leave


class _Closing:
    """A device resource that is released at the end of a ``with`` block."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        at_exit(self.close)(*fault)


class Event(_Closing):
    """A CUDA event: a mark in a stream that other streams or the host can wait for."""

    def __init__(self, event: Any) -> None:
        self.inner = event

    def sync(self) -> None:
        """Wait until the device has passed the mark. Returns at once if it was never recorded."""
        _ask(self.inner.sync)

    def close(self) -> None:
        """Give it back."""
        _ask(self.inner.close)


class Graph(_Closing):
    """Work that was captured from a stream, launched as one piece."""

    def __init__(self, executable: Any, driver: Any) -> None:
        self._executable = executable
        self._driver = driver

    def launch(self, stream: Stream) -> None:
        """Enqueue it."""
        _value(self._driver.cuGraphLaunch(self._executable, stream.handle))

    def close(self) -> None:
        """Give it back."""
        _value(self._driver.cuGraphExecDestroy(self._executable))


class Stream(_Closing):
    """An ordered queue of work."""

    def __init__(self, stream: Any, driver: Any) -> None:
        self.inner = stream
        self._driver = driver

    @property
    def handle(self) -> int:
        """The ``cudaStream_t``, as engines expect it."""
        return int(self.inner.handle)

    def record(self, event: Event) -> None:
        """Record the event behind everything enqueued so far."""
        _ask(self.inner.record, event.inner)

    def wait(self, event: Event) -> None:
        """Make work enqueued from now on wait for an event, on the device."""
        _ask(self.inner.wait, event.inner)

    def sync(self) -> None:
        """Wait until the device has finished everything enqueued."""
        _ask(self.inner.sync)

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """Capture the work that ``enqueue`` puts into this stream and into streams that wait for it.

        None of the work runs. Before ``enqueue`` ends, this stream has to wait for every stream that joined.
        Uses the driver API: cuda-core's graph builder (1.2) crashes the process when a capture fails.

        Raises:
            Exception: whatever ``enqueue`` raises; the stream stays usable.
        """
        driver, stream = self._driver, self.handle
        # Other threads may allocate during the capture; a forbidden call of this thread must fail.
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _value(driver.cuStreamBeginCapture(stream, mode))
        try:
            enqueue()
        except BaseException:
            _, graph = driver.cuStreamEndCapture(stream)  # its own error says less
            if graph is not None:
                driver.cuGraphDestroy(graph)
            raise
        graph = _value(driver.cuStreamEndCapture(stream))
        try:
            executable = _value(driver.cuGraphInstantiate(graph, 0))
        finally:
            driver.cuGraphDestroy(graph)
        made = Graph(executable, driver)
        try:
            _value(driver.cuGraphUpload(executable, stream))
        except BaseException:
            made.close()
            raise
        return made

    def close(self) -> None:
        """Give it back."""
        _ask(self.inner.close)


class DeviceArray(_Closing):
    """An array in the device's memory, whose address never changes.

    Attributes:
        shape, dtype: as of a NumPy array in C order.
    """

    def __init__(self, buffer: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.inner = buffer
        self.shape = shape
        self.dtype = dtype

    @property
    def address(self) -> int:
        """Device address."""
        return int(self.inner.handle)

    def rows(self, first: int, count: int) -> DeviceArray:
        """A view of ``count`` rows from ``first`` on; it needs no close."""
        size = self.inner.size // self.shape[0]
        part = _ask(type(self.inner).from_handle, self.address + first * size, count * size, owner=self.inner)
        return DeviceArray(part, (count, *self.shape[1:]), self.dtype)

    def copy_from(self, source: DeviceArray | PinnedArray, stream: Stream) -> None:
        """Enqueue a copy of an equally large array."""
        _ask(self.inner.copy_from, source.inner, stream=stream.inner)

    def clear(self, stream: Stream) -> None:
        """Enqueue filling the array with zeros."""
        _ask(self.inner.fill, 0, stream=stream.inner)

    def close(self) -> None:
        """Release it, after the work enqueued on its stream."""
        _ask(self.inner.close)


class PinnedArray(_Closing):
    """An array in pinned host memory, which the device copies asynchronously.

    Attributes:
        array: the same memory as a NumPy array; invalid once closed.
    """

    def __init__(self, buffer: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.inner = buffer
        self.array: NDArray[Any] = _ask(np.from_dlpack, buffer).view(dtype).reshape(shape)

    def copy_from(self, source: DeviceArray, stream: Stream) -> None:
        """Enqueue a copy of an equally large array; it is complete after a ``sync``."""
        _ask(self.inner.copy_from, source.inner, stream=stream.inner)

    def close(self) -> None:
        """Give it back."""
        del self.array
        _ask(self.inner.close)


class CudaDevice:
    """The first GPU.

    Attributes:
        gpu: the GPU's name, compute capability and memory.

    Raises:
        MissingDependencyError: if cuda-core is not installed.
        EngineError: if there is no driver, it is too old, or there is no GPU.
    """

    def __init__(self) -> None:
        try:
            self._core = importlib.import_module("cuda.core")
            self._driver = importlib.import_module("cuda.bindings.driver")
            needed = int(importlib.import_module("cuda.bindings").__version__.split(".")[0])
        except ImportError:
            raise MissingDependencyError(
                "cuda-core", extra="tensorrt", purpose="Running engines on a GPU"
            ) from None
        self.gpu = _usable_gpu(needed)
        try:
            self._device = _ask(self._core.Device, 0)
            self.activate()
        except EngineError as error:
            raise EngineError(f"{self.gpu} cannot be used: {error.message}", hint=error.hint) from None
        self._pinned = self._core.LegacyPinnedMemoryResource()

    def activate(self) -> None:
        """Make it the calling thread's device."""
        _ask(self._device.set_current)

    def stream(self) -> Stream:
        """A new stream."""
        return Stream(_ask(self._device.create_stream), self._driver)

    def event(self) -> Event:
        """A new event; a thread that waits for it sleeps instead of spinning."""
        options = self._core.EventOptions(blocking_sync=True)
        return Event(_ask(self._device.create_event, options=options))

    def array(self, shape: tuple[int, ...], dtype: DTypeLike, stream: Stream) -> DeviceArray:
        """An uninitialised device array, usable in work enqueued on ``stream`` from now on.

        Raises:
            EngineError: if the device is out of memory.
        """
        size = _bytes(shape, dtype)
        with self._allocating(size, "the samples"):
            buffer = _ask(self._device.allocate, size, stream=stream.inner)
        return DeviceArray(buffer, shape, np.dtype(dtype))

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> PinnedArray:
        """An uninitialised array in pinned host memory.

        Raises:
            EngineError: if there is not enough.
        """
        size = _bytes(shape, dtype)
        with self._allocating(size, "the samples in page-locked host memory"):
            buffer = _ask(self._pinned.allocate, size)
        return PinnedArray(buffer, shape, np.dtype(dtype))

    def full(self, size: int, purpose: str) -> EngineError:
        """The error of a device without ``size`` bytes of free memory."""
        left = ""
        with contextlib.suppress(Exception):  # the amount of free memory is optional
            _, free, total = self._driver.cuMemGetInfo()
            left = f"; {_mebibytes(free)} of {_mebibytes(total)} are free"
        return EngineError(
            f"{self.gpu} is out of memory: {_mebibytes(size)} were needed for {purpose}{left}",
            hint=_FULL,
        )

    @contextlib.contextmanager
    def _allocating(self, size: int, purpose: str) -> Iterator[None]:
        try:
            yield
        except EngineError as error:
            if _OUT_OF_MEMORY not in error.message:
                raise
            raise self.full(size, purpose) from None


def _ask(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function of cuda-core.

    Raises:
        EngineError: in place of cuda-core's exceptions, whose types are private.
    """
    try:
        return function(*arguments, **options)
    except Exception as error:
        raise _refusal(str(error) or type(error).__name__) from None


def _value(returned: tuple[Any, ...]) -> Any:
    """The value that a driver function returned beside its status code, if any.

    Raises:
        EngineError: naming the code, if it is an error.
    """
    code, *values = returned
    if code:
        raise _refusal(code.name)
    return values[0] if values else None


def _refusal(said: str) -> EngineError:
    """Make the error of a failed CUDA call; ``said`` begins with the name of the error code."""
    hint = _FULL if _OUT_OF_MEMORY in said else _AFRESH if _FATAL.search(said) else _HINT
    return EngineError(f"CUDA refuses: {' '.join(said.split())}", hint=hint)


def _usable_gpu(needed: int) -> Gpu:
    """The first GPU, if its driver supports CUDA ``needed``, which the bindings are made for."""
    driver = query_driver()
    if driver.cuda is not None and int(driver.cuda.split(".")[0]) < needed:
        raise EngineError(
            f"the NVIDIA driver is too old: it serves CUDA {driver.cuda}, CUDA {needed}.0 is needed",
            hint="Update the driver; see: admtrt doctor",
        )
    if driver.gpu is None:
        raise EngineError(f"no engine can run here: {driver.fault}", hint=_HINT)
    return driver.gpu


def _bytes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _mebibytes(size: int) -> str:
    return f"{math.ceil(size / 2**20):,} MiB"
