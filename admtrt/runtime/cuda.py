"""A thin layer over cuda-core: one GPU's memory, streams, events and graphs, each a context manager.

Nothing here waits for the device unless its name says so (``sync``). A :class:`CudaDevice` and what it made
belong to the thread that last called :meth:`CudaDevice.activate`. Whatever CUDA refuses, now or in work that
was enqueued before, is an :class:`~admtrt.errors.EngineError` of the method that hears of it.
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
"""Every member that is used of ``cuda.core``; a test walks it."""

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
"""The same of ``cuda.bindings.driver``."""

_OUT_OF_MEMORY = "OUT_OF_MEMORY"  # in the driver's name of the fault
_FULL = "Use a smaller --batch-size, or end other programs on the GPU."
_HINT = "Use a CPU backend, or see what this machine lacks with: admtrt doctor"
# Faults of work on the device, after which the driver refuses everything else that the process asks for.
_FATAL = re.compile(
    r"ILLEGAL_(ADDRESS|INSTRUCTION)|MISALIGNED|INVALID_(ADDRESS_SPACE|PC)|LAUNCH_(FAILED|TIMEOUT)"
    r"|HARDWARE_STACK|ASSERT|ECC|CONTAINED|LEAK"
)
_AFRESH = (
    "The GPU serves this process no more: start the command again; if it fails again, use another backend."
)


def at_exit(close: Callable[[], object]) -> Callable[..., None]:
    """``close`` as :meth:`contextlib.ExitStack.push` takes it: its fault never replaces one under way.

    What fails while things are given back is most often the consequence of what failed before.
    """

    def leave(_: object, error: BaseException | None, __: object) -> None:
        try:
            close()
        except Exception:
            if error is None:
                raise

    return leave


class _Closing:
    """Something of the device that is given back at the end of a ``with`` block."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        at_exit(self.close)(*fault)


class Event(_Closing):
    """A mark in a stream, for other streams or the host to wait for."""

    def __init__(self, event: Any) -> None:
        self.inner = event

    def sync(self) -> None:
        """Wait until the device has passed the mark; at once if it was never set."""
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
        """The ``cudaStream_t``, as engines want it."""
        return int(self.inner.handle)

    def record(self, event: Event) -> None:
        """Set the mark behind everything that was enqueued so far."""
        _ask(self.inner.record, event.inner)

    def wait(self, event: Event) -> None:
        """Let what is enqueued from now on wait for a mark, on the device."""
        _ask(self.inner.wait, event.inner)

    def sync(self) -> None:
        """Wait until the device has done everything that was enqueued."""
        _ask(self.inner.sync)

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """Capture the work that ``enqueue`` puts into this stream and those that wait for it.

        Nothing of it runs. Streams that joined have to be waited for again before ``enqueue`` ends. By the
        driver's own functions: cuda-core's graph builder, as of 1.2, takes the process down with it when a
        capture failed.

        Raises:
            Exception: whatever ``enqueue`` raises; the stream is usable.
        """
        driver, stream = self._driver, self.handle
        # Another thread may allocate meanwhile; a forbidden call of this one must fail, not be lost.
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _value(driver.cuStreamBeginCapture(stream, mode))
        try:
            enqueue()
        except BaseException:
            _, graph = driver.cuStreamEndCapture(stream)  # with a fault of its own, which says less
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
        """``count`` rows from ``first`` on, in the same memory; there is nothing to give back."""
        size = self.inner.size // self.shape[0]
        part = _ask(type(self.inner).from_handle, self.address + first * size, count * size, owner=self.inner)
        return DeviceArray(part, (count, *self.shape[1:]), self.dtype)

    def copy_from(self, source: DeviceArray | PinnedArray, stream: Stream) -> None:
        """Enqueue a copy of an equally large array."""
        _ask(self.inner.copy_from, source.inner, stream=stream.inner)

    def clear(self, stream: Stream) -> None:
        """Enqueue filling with zeros."""
        _ask(self.inner.fill, 0, stream=stream.inner)

    def close(self) -> None:
        """Give it back, after what was enqueued on the stream that it was allocated for."""
        _ask(self.inner.close)


class PinnedArray(_Closing):
    """An array in host memory that the device reads and writes while the host goes on.

    Attributes:
        array: the same memory for NumPy; not to be touched after the end.
    """

    def __init__(self, buffer: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.inner = buffer
        self.array: NDArray[Any] = _ask(np.from_dlpack, buffer).view(dtype).reshape(shape)

    def copy_from(self, source: DeviceArray, stream: Stream) -> None:
        """Enqueue a copy of an equally large array; it is there after a ``sync``."""
        _ask(self.inner.copy_from, source.inner, stream=stream.inner)

    def close(self) -> None:
        """Give it back."""
        del self.array
        _ask(self.inner.close)


class CudaDevice:
    """The first GPU.

    Attributes:
        gpu: its name, compute capability and memory.

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
        """A new mark; a thread that waits for it sleeps."""
        options = self._core.EventOptions(blocking_sync=True)
        return Event(_ask(self._device.create_event, options=options))

    def array(self, shape: tuple[int, ...], dtype: DTypeLike, stream: Stream) -> DeviceArray:
        """Memory of the device, not yet filled, usable after what was enqueued on a stream.

        Raises:
            EngineError: if it is full.
        """
        size = _bytes(shape, dtype)
        with self._allocating(size, "the samples"):
            buffer = _ask(self._device.allocate, size, stream=stream.inner)
        return DeviceArray(buffer, shape, np.dtype(dtype))

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> PinnedArray:
        """Host memory that the device reaches, not yet filled.

        Raises:
            EngineError: if there is not enough.
        """
        size = _bytes(shape, dtype)
        with self._allocating(size, "the samples in page-locked host memory"):
            buffer = _ask(self._pinned.allocate, size)
        return PinnedArray(buffer, shape, np.dtype(dtype))

    def full(self, size: int, purpose: str) -> EngineError:
        """The error of a device that has not ``size`` bytes left for something."""
        left = ""
        with contextlib.suppress(Exception):  # a figure for people; the fault itself is known
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
    """Result of a function of cuda-core.

    Raises:
        EngineError: in place of what it raises, whose types are of private modules.
    """
    try:
        return function(*arguments, **options)
    except Exception as error:
        raise _refusal(str(error) or type(error).__name__) from None


def _value(returned: tuple[Any, ...]) -> Any:
    """Result of a driver's function beside its code, if it returns anything.

    Raises:
        EngineError: naming the code, if it is one of a fault.
    """
    code, *values = returned
    if code:
        raise _refusal(code.name)
    return values[0] if values else None


def _refusal(said: str) -> EngineError:
    """The error of anything that CUDA refuses; ``said`` begins with the name of its code."""
    hint = _FULL if _OUT_OF_MEMORY in said else _AFRESH if _FATAL.search(said) else _HINT
    return EngineError(f"CUDA refuses: {' '.join(said.split())}", hint=hint)


def _usable_gpu(needed: int) -> Gpu:
    """The first GPU, if its driver is as new as the bindings, which are for CUDA ``needed``."""
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
