"""The doubles refuse what the real libraries punish; else the tests upon them could not fail."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from cuda_double import Buffer, CudaError, Device, Event, Machine, MisuseError, PinnedMemoryResource, Stream
from engine_double import (
    Context,
    ExecutionContextAllocationStrategy,
    ILogger,
    Severity,
    engine_library,
    plan_bytes,
)
from onnx_graphs import parse

if TYPE_CHECKING:
    from pathlib import Path


class Log(ILogger):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, severity: Severity, msg: str) -> None:
        self.lines.append(msg)


class Bench:
    """A GPU with two streams and two arrays of 8 bytes, and a context of ``y = 2x`` on them."""

    def __init__(self, folder: Path) -> None:
        self.machine = Machine()
        self.device = Device(self.machine)
        self.device.set_current()
        self.one, self.two = self.device.create_stream(), self.device.create_stream()
        self.x, self.y = (self.device.allocate(8, stream=self.one) for _ in "xy")
        onnx.save(parse("g (float[N] x) => (float[N] y) { y = Add(x, x) }"), folder / "double.onnx")
        self.log = Log()
        runtime = engine_library(self.machine).Runtime(self.log)
        runtime.engine_host_code_allowed = False
        self.engine = runtime.deserialize_cuda_engine(plan_bytes(folder / "double.onnx", ((1, 2, 4),)))
        config = self.engine.create_runtime_config()
        strategy = ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        config.set_execution_context_allocation_strategy(strategy)
        self.context: Context = self.engine.create_execution_context(config)

    def bind(self) -> None:
        assert self.context.set_input_shape("x", (2,))
        for name, buffer in (("x", self.x), ("y", self.y)):
            assert self.context.set_tensor_address(name, buffer.handle)

    def run(self, stream: Stream) -> bool:
        return self.context.execute_async_v3(stream.handle)

    def event(self) -> Event:
        return self.device.create_event(options={"blocking_sync": True})

    def pinned(self, value: float) -> Buffer:
        made = PinnedMemoryResource(self.machine).allocate(8)
        np.from_dlpack(made).view(np.float32)[:] = value
        return made


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_work_is_done_late_and_in_order(bench: Bench) -> None:
    bench.bind()
    source, target = bench.pinned(3), bench.pinned(0)
    bench.x.copy_from(source, stream=bench.one)
    assert bench.run(bench.one)
    target.copy_from(bench.y, stream=bench.one)
    seen = np.from_dlpack(target).view(np.float32)
    assert seen.tolist() == [0, 0]
    bench.one.sync()
    assert seen.tolist() == [6, 6]


def test_memory_that_is_filled_again_too_early_gives_wrong_values(bench: Bench) -> None:
    source = bench.pinned(1)
    bench.x.copy_from(source, stream=bench.one)
    np.from_dlpack(source).view(np.float32)[:] = 2
    bench.one.sync()
    assert bench.x.data.view(np.float32)[0] == 2


def test_two_streams_need_an_order(bench: Bench) -> None:
    bench.bind()
    bench.x.fill(0, stream=bench.one)
    with pytest.raises(MisuseError, match="without an order"):
        bench.run(bench.two)
    event = bench.event()
    bench.one.record(event)
    bench.two.wait(event)
    assert bench.run(bench.two)
    with pytest.raises(MisuseError, match="without an order"):
        bench.x.fill(0, stream=bench.one)


def test_a_context_runs_once_at_a_time(bench: Bench) -> None:
    bench.bind()
    bench.run(bench.one)
    bench.context.set_tensor_address("y", bench.device.allocate(8, stream=bench.two).handle)
    with pytest.raises(MisuseError, match="scratch memory"):
        bench.run(bench.two)


def test_shapes_and_addresses(bench: Bench) -> None:
    assert not bench.run(bench.one)
    assert "was not set" in bench.log.lines[-1]
    assert not bench.context.set_input_shape("x", (5,))
    assert "outside profile" in bench.log.lines[-1]
    bench.bind()
    assert bench.context.set_input_shape("x", (3,))
    with pytest.raises(MisuseError, match="x lies in 8 bytes"):
        bench.run(bench.one)
    bench.bind()
    bench.context.set_tensor_address("x", bench.pinned(0).handle)
    with pytest.raises(MisuseError, match="no memory of the device"):
        bench.run(bench.one)
    with pytest.raises(MisuseError, match="default stream"):
        bench.context.execute_async_v3(0)


def test_memory_that_was_freed(bench: Bench) -> None:
    bench.bind()
    bench.x.close()
    with pytest.raises(MisuseError, match="no memory of the device"):
        bench.run(bench.one)
    with pytest.raises(MisuseError, match="was freed"):
        bench.x.fill(0, stream=bench.one)
    source = bench.pinned(0)
    bench.y.copy_from(source, stream=bench.one)
    with pytest.raises(MisuseError, match="while the device works on it"):
        source.close()


def test_threads(bench: Bench) -> None:
    faults: list[Exception] = []

    def work() -> None:
        try:
            bench.x.fill(0, stream=bench.one)
        except MisuseError as error:
            faults.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "not current in this thread" in str(faults[0])


def captured(bench: Bench) -> Any:
    driver = bench.machine.driver()
    driver.cuStreamBeginCapture(bench.one.handle, "thread_local")
    assert bench.run(bench.one)
    _, capture = driver.cuStreamEndCapture(bench.one.handle)
    assert capture is not None
    _, graph = driver.cuGraphInstantiate(capture, 0)
    driver.cuGraphUpload(graph, bench.one.handle)
    return graph


def test_graphs_need_a_first_run_and_an_unchanged_context(bench: Bench) -> None:
    bench.bind()
    with pytest.raises(AssertionError):
        captured(bench)
    with pytest.raises(CudaError, match="INVALIDATED"):
        bench.one.sync()
    assert bench.machine.driver().cuStreamEndCapture(bench.one.handle) == (901, None)
    bench.run(bench.one)
    graph = captured(bench)
    bench.x.fill(0, stream=bench.one)
    graph.launch(bench.one)
    bench.one.sync()
    assert bench.y.data.tolist() == [0] * 8
    bench.context.set_tensor_address("x", bench.y.handle)
    with pytest.raises(MisuseError, match="changed after the capture"):
        graph.launch(bench.one)


def test_graphs_of_freed_memory(bench: Bench) -> None:
    bench.bind()
    bench.run(bench.one)
    graph = captured(bench)
    bench.y.close()
    with pytest.raises(MisuseError, match="was freed"):
        graph.launch(bench.one)


def test_a_capture_takes_no_waiting_and_must_be_joined(bench: Bench) -> None:
    bench.bind()
    bench.run(bench.one)
    bench.one.sync()
    driver, event, stream = bench.machine.driver(), bench.event(), bench.one.handle
    driver.cuStreamBeginCapture(stream, "thread_local")
    bench.one.record(event)
    bench.two.wait(event)
    bench.run(bench.two)
    assert driver.cuStreamEndCapture(stream) == (904, None)
    driver.cuStreamBeginCapture(stream, "thread_local")
    with pytest.raises(CudaError, match="CAPTURE_UNSUPPORTED"):
        bench.one.sync()
    assert driver.cuStreamEndCapture(stream) == (901, None)
    bench.one.sync()


def test_host_code_of_plans(bench: Bench, tmp_path: Path) -> None:
    runtime = engine_library(bench.machine).Runtime(bench.log)
    with pytest.raises(MisuseError, match="host code"):
        runtime.deserialize_cuda_engine(plan_bytes(tmp_path / "double.onnx"))
