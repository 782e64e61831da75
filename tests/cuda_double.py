"""A strict double of cuda-core's part that admtrt uses.

Work is done as late as the device may do it: when the host waits for it, or for something behind it. What no
order protects (two streams on one array, memory that is freed or filled again too early, another thread) is
refused when it is enqueued, or shows as wrong values. Nothing is forgiven that the real library punishes.
"""

from __future__ import annotations

import itertools
import threading
from enum import IntEnum
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_POISON = 0xFF  # every float of these bytes is NaN


class MisuseError(AssertionError):
    """Something that the real library answers with wrong results or a crash."""


class CudaError(Exception):
    """What the real library raises."""


class Operation:
    """Work in a stream or in a capture; ``before`` holds the numbers of all work that is done earlier."""

    def __init__(self, number: int, run: Callable[[], None], after: Iterable[Operation]) -> None:
        self.number, self.run, self.after, self.done = number, run, list(after), False
        self.before = 1 << number
        for other in self.after:
            self.before |= other.before

    def follows(self, other: Operation) -> bool:
        return other.done or bool(self.before >> other.number & 1)

    def finish(self) -> None:
        if not self.done:
            for other in self.after:
                other.finish()
            self.done = True
            self.run()


class Resource:
    """Something that one piece of work at a time may write: an array, or a context's scratch memory."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.used: dict[Any, tuple[Operation | None, list[Operation]]] = {}  # writer and readers, by timeline

    def access(self, operation: Operation, timeline: Any, *, write: bool) -> None:
        writer, readers = self.used.get(timeline, (None, []))
        for other in ([writer] if writer else []) + (readers if write else []):
            if not operation.follows(other):
                raise MisuseError(f"{self.label} is used by two streams without an order")
        self.used[timeline] = (operation, []) if write else (writer, [*readers, operation])


class Capture:
    def __init__(self, origin: Stream) -> None:
        self.origin = origin
        self.streams = {origin}
        self.nodes: list[tuple[Operation, list[Resource], list[Resource]]] = []
        self.checks: list[Callable[[], None]] = []
        self.fault = ""
        self.active = True
        self.before = origin.last
        """What the origin goes on behind."""

    def leave(self) -> None:
        self.active = False
        for stream in self.streams:
            stream.capture, stream.last, stream.waiting = None, [], []
        self.origin.last = self.before


class Machine:
    """One GPU: its memory, its streams and everything that was enqueued."""

    def __init__(self, *, memory: int = 2**30) -> None:
        self.free = memory
        self.memory = memory
        self.thread: int | None = None
        self.addresses = itertools.count(0x7F0000000000, 2**24)
        self.buffers: dict[int, Buffer] = {}
        self.streams: dict[int, Stream] = {}
        self.numbers = itertools.count()
        self.log: list[str] = []
        """What was enqueued, and where the host waited, in order."""
        self.finished: list[str] = []
        """What was done of it."""

    def touch(self) -> None:
        if self.thread != threading.get_ident():
            raise MisuseError("the device is not current in this thread")

    def submit(
        self,
        stream: Stream,
        name: str,
        run: Callable[[], None],
        *,
        reads: Iterable[Resource] = (),
        writes: Iterable[Resource] = (),
    ) -> None:
        self.touch()
        stream.check()
        reads, writes = list(reads), list(writes)
        for resource in [*reads, *writes]:
            if isinstance(resource, Buffer):
                resource.check()
        capture = stream.capture

        def work() -> None:
            run()
            if capture is None:
                self.finished.append(name)

        operation = Operation(next(self.numbers), work, [*stream.waiting, *stream.last])
        for resource in reads:
            resource.access(operation, capture, write=False)
        for resource in writes:
            resource.access(operation, capture, write=True)
        stream.waiting, stream.last = [], [operation]
        if capture is None:
            self.log.append(f"{stream.name}: {name}")
        else:
            capture.nodes.append((operation, reads, writes))

    def namespace(self) -> SimpleNamespace:
        """The double of the module ``cuda.core``."""

        def device(ordinal: int) -> Device:
            assert ordinal == 0
            return Device(self)

        def event_options(*, blocking_sync: bool = False) -> dict[str, bool]:
            return {"blocking_sync": blocking_sync}

        return SimpleNamespace(
            Device=device,
            EventOptions=event_options,
            LegacyPinnedMemoryResource=lambda: PinnedMemoryResource(self),
        )

    def driver(self) -> Driver:
        """The double of the module ``cuda.bindings.driver``."""
        return Driver(self)


class Buffer(Resource):
    def __init__(self, machine: Machine, size: int, stream: Stream | None) -> None:
        super().__init__(f"buffer of {size} bytes")
        self.machine, self.size, self.stream, self.closed = machine, size, stream, False
        self.handle = next(machine.addresses)
        self.data = np.full(size, _POISON, dtype=np.uint8)
        machine.buffers[self.handle] = self

    def check(self) -> None:
        if self.closed:
            raise MisuseError(f"{self.label} was freed")

    def copy_from(self, src: Buffer, *, stream: Stream) -> None:
        if src.size != self.size:
            raise ValueError(f"{src.size} bytes into {self.size}")

        def run() -> None:
            self.data[:] = src.data

        self.machine.submit(stream, "copy", run, reads=[src], writes=[self])

    def fill(self, value: int, *, stream: Stream) -> None:
        self.machine.submit(stream, "fill", lambda: self.data.fill(value), writes=[self])

    def close(self) -> None:
        self.check()
        if self.stream is None:  # page-locked memory goes at once
            writer, readers = self.used.get(None, (None, []))
            if not all(operation.done for operation in [*readers, *([writer] if writer else [])]):
                raise MisuseError(f"{self.label} is freed while the device works on it")
            self.data.fill(_POISON)
        else:
            self.machine.submit(self.stream, "free", lambda: None, writes=[self])
            self.machine.free += self.size
        self.closed = True
        del self.machine.buffers[self.handle]

    def __dlpack__(self, **options: Any) -> Any:
        if self.stream is not None:
            raise MisuseError("the host looks into the device's memory")
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class PinnedMemoryResource:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def allocate(self, size: int) -> Buffer:
        self.machine.touch()
        return Buffer(self.machine, size, None)


class Device:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def set_current(self) -> None:
        self.machine.thread = threading.get_ident()

    def allocate(self, size: int, *, stream: Stream) -> Buffer:
        self.machine.touch()
        stream.check()
        if stream.capture is not None:
            raise MisuseError("memory is allocated during a capture")
        if size > self.machine.free:
            raise CudaError("CUDA_ERROR_OUT_OF_MEMORY: the API call failed because it was unable to allocate")
        self.machine.free -= size
        return Buffer(self.machine, size, stream)

    def create_stream(self) -> Stream:
        self.machine.touch()
        return Stream(self.machine)

    def create_event(self, *, options: dict[str, bool]) -> Event:
        self.machine.touch()
        assert options == {"blocking_sync": True}
        return Event(self.machine)


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.marked: list[Operation] = []
        self.capture: Capture | None = None
        self.closed = False

    def sync(self) -> None:
        self.machine.touch()
        if self.closed or self.capture is not None:
            raise MisuseError("the host waits for an event that is closed or belongs to a capture")
        for operation in self.marked:
            operation.finish()

    def close(self) -> None:
        self.closed = True


class Stream:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.name = f"s{len(machine.streams)}"
        self.handle = 0x1000 + len(machine.streams)
        self.last: list[Operation] = []
        self.waiting: list[Operation] = []
        self.capture: Capture | None = None
        self.closed = False
        machine.streams[self.handle] = self

    def check(self) -> None:
        if self.closed:
            raise MisuseError("a closed stream is used")
        if self.capture is not None and self.capture.fault:
            raise CudaError(f"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED: {self.capture.fault}")

    def record(self, event: Event) -> None:
        self.machine.touch()
        self.check()
        event.marked, event.capture = [*self.last, *self.waiting], self.capture

    def wait(self, event: Event) -> None:
        self.machine.touch()
        self.check()
        if event.capture is not self.capture:
            if self.capture is not None or event.capture is None or not event.capture.active:
                raise CudaError("CUDA_ERROR_STREAM_CAPTURE_ISOLATION")
            self.capture = event.capture
            event.capture.streams.add(self)
            self.last = []
        self.waiting = [*self.waiting, *event.marked]

    def sync(self) -> None:
        self.machine.touch()
        self.check()
        if self.capture is not None:
            self.capture.fault = "a stream that is captured was awaited"
            raise CudaError("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        self.machine.log.append(f"host waits for {self.name}")
        for operation in [*self.last, *self.waiting]:
            operation.finish()

    def close(self) -> None:
        self.closed = True


class Code(IntEnum):
    """Of the real ``CUresult``."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901
    CUDA_ERROR_STREAM_CAPTURE_UNJOINED = 904


class Driver:
    """Functions of the driver, which return a code, and a value where there is no fault."""

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread_local")

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.captures: set[Capture] = set()
        """Those that were ended and not destroyed."""

    def cuMemGetInfo(self) -> tuple[Code, int, int]:  # noqa: N802
        return Code.CUDA_SUCCESS, self.machine.free, self.machine.memory

    def cuStreamBeginCapture(self, hStream: int, mode: str) -> tuple[Code]:  # noqa: N802
        self.machine.touch()
        assert mode == "thread_local"
        stream = self.machine.streams[hStream]
        stream.check()
        assert stream.capture is None
        stream.capture = Capture(stream)
        stream.last = []
        return (Code.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, hStream: int) -> tuple[Code, Capture | None]:  # noqa: N802
        stream = self.machine.streams[hStream]
        capture = stream.capture
        assert capture is not None
        assert capture.origin is stream
        end = 0
        for operation in [*stream.last, *stream.waiting]:
            end |= operation.before
        capture.leave()
        if capture.fault:
            return Code.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        if any(not end >> operation.number & 1 for operation, _, _ in capture.nodes):
            return Code.CUDA_ERROR_STREAM_CAPTURE_UNJOINED, None
        self.captures.add(capture)
        return Code.CUDA_SUCCESS, capture

    def cuGraphInstantiate(self, hGraph: Capture, flags: int) -> tuple[Code, Graph]:  # noqa: N802
        assert flags == 0
        assert hGraph in self.captures
        return Code.CUDA_SUCCESS, Graph(self.machine, hGraph)

    def cuGraphDestroy(self, hGraph: Capture) -> tuple[Code]:  # noqa: N802
        self.captures.remove(hGraph)
        return (Code.CUDA_SUCCESS,)

    def cuGraphUpload(self, hGraphExec: Graph, hStream: int) -> tuple[Code]:  # noqa: N802
        self.machine.streams[hStream].check()
        hGraphExec.uploaded = True
        return (Code.CUDA_SUCCESS,)

    def cuGraphLaunch(self, hGraphExec: Graph, hStream: int) -> tuple[Code]:  # noqa: N802
        hGraphExec.launch(self.machine.streams[hStream])
        return (Code.CUDA_SUCCESS,)

    def cuGraphExecDestroy(self, hGraphExec: Graph) -> tuple[Code]:  # noqa: N802
        assert not hGraphExec.closed
        hGraphExec.closed = True
        return (Code.CUDA_SUCCESS,)


class Graph:
    """An executable graph."""

    def __init__(self, machine: Machine, capture: Capture) -> None:
        self.machine, self.capture, self.closed, self.uploaded = machine, capture, False, False

    def launch(self, stream: Stream) -> None:
        if self.closed or not self.uploaded:
            raise MisuseError("a graph is launched that is closed, or was not uploaded before")
        for check in self.capture.checks:
            check()

        def run() -> None:
            for operation, _, _ in reversed(self.capture.nodes):  # branches in the order that is not written
                operation.finish()
            for operation, _, _ in self.capture.nodes:
                operation.done = False

        nodes = self.capture.nodes
        self.machine.submit(
            stream,
            "graph",
            run,
            reads=dict.fromkeys(resource for _, reads, _ in nodes for resource in reads),
            writes=dict.fromkeys(resource for _, _, writes in nodes for resource in writes),
        )
