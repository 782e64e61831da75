"""A strict double of cuda-core's part that admtrt uses.

Work is done as late as the device may do it: when the host waits for it, or for something behind it. What no
order protects (two streams on one array, memory that is freed or filled again too early, another thread) is
refused when it is enqueued, or shows as wrong values. Nothing is forgiven that the real library punishes.
"""

from __future__ import annotations

import itertools
import threading
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

    def driver(self) -> SimpleNamespace:
        """The double of the module ``cuda.bindings.driver``."""
        return SimpleNamespace(cuMemGetInfo=lambda: (0, self.free, self.memory))


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

    def create_graph_builder(self) -> GraphBuilder:
        return GraphBuilder(self)


class GraphBuilder:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.saved: list[Operation] = []
        self.finished: Capture | None = None

    def begin_building(self, mode: str) -> GraphBuilder:
        self.stream.machine.touch()
        assert mode == "thread_local"
        self.saved, self.stream.last = self.stream.last, []
        self.stream.capture = Capture(self.stream)
        return self

    def end_building(self) -> GraphBuilder:
        capture = self.stream.capture
        assert capture is not None
        self.stream.check()
        end = 0
        for operation in [*self.stream.last, *self.stream.waiting]:
            end |= operation.before
        if any(not end >> operation.number & 1 for operation, _, _ in capture.nodes):
            capture.fault = "a stream that joined the capture was not awaited"
            raise CudaError("CUDA_ERROR_STREAM_CAPTURE_UNJOINED")
        self.finished = capture
        self._leave(capture)
        return self

    def complete(self) -> Graph:
        assert self.finished is not None
        return Graph(self.stream.machine, self.finished)

    def close(self) -> None:
        if self.stream.capture is not None:
            self._leave(self.stream.capture)

    def _leave(self, capture: Capture) -> None:
        capture.active = False
        for stream in capture.streams:
            stream.capture, stream.last, stream.waiting = None, [], []
        self.stream.last = self.saved


class Graph:
    def __init__(self, machine: Machine, capture: Capture) -> None:
        self.machine, self.capture, self.closed, self.uploaded = machine, capture, False, False

    def upload(self, stream: Stream) -> None:
        stream.check()
        self.uploaded = True

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

    def close(self) -> None:
        self.closed = True
