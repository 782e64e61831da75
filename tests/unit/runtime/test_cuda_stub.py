"""The driver stub and the library's double detect what fails on the real ones, so that tests can fail."""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING

import cuda_stub
import numpy as np
import onnx
import pytest
from engine_double import (
    Context,
    ExecutionContextAllocationStrategy,
    ILogger,
    MisuseError,
    Severity,
    engine_library,
    plan_bytes,
)
from onnx_graphs import parse

from admtrt.errors import EngineError
from admtrt.runtime.cuda import CudaDevice

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from admtrt.runtime.cuda import DeviceArray, Event, PinnedArray, Stream


class Log(ILogger):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, severity: Severity, msg: str) -> None:
        self.lines.append(msg)


class Bench:
    """Two streams, two arrays of two floats, a context of ``y = 2x`` on them; all that is made lives on."""

    def __init__(self, folder: Path) -> None:
        self.device = CudaDevice()
        self.one, self.two = self.device.stream(), self.device.stream()
        self.x, self.y = (self.device.array((2,), np.float32, self.one) for _ in "xy")
        onnx.save(parse("g (float[N] x) => (float[N] y) { y = Add(x, x) }"), folder / "double.onnx")
        self.log = Log()
        runtime = engine_library().Runtime(self.log)
        runtime.engine_host_code_allowed = False
        self.engine = runtime.deserialize_cuda_engine(plan_bytes(folder / "double.onnx", ((1, 2, 4),)))
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE)
        self.context: Context | None = self.engine.create_execution_context(config)
        self.context.set_optimization_profile_async(0, self.one.handle)
        self.kept: list[PinnedArray | Event] = []

    def bind(self) -> None:
        assert self.context is not None
        assert self.context.set_input_shape("x", (2,))
        for name, array in (("x", self.x), ("y", self.y)):
            assert self.context.set_tensor_address(name, array.address)

    def run(self, stream: Stream) -> bool:
        assert self.context is not None
        return self.context.execute_async_v3(stream.handle)

    def order(self, first: Stream, then: Stream) -> None:
        event = self.device.event()
        self.kept.append(event)
        first.record(event)
        then.wait(event)

    def pinned(self, value: float) -> PinnedArray:
        made = self.device.pinned((2,), np.float32)
        self.kept.append(made)
        made.array[:] = value
        return made

    def seen(self, array: DeviceArray) -> list[float]:
        return np.frombuffer(cuda_stub.memory_at(array.address, 8), np.float32).tolist()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    cuda_stub.reset()
    monkeypatch.setattr("admtrt.runtime.engines.device._LIBRARIES", (cuda_stub.library_path(),))
    made = Bench(tmp_path)
    yield made
    made.one.sync()
    made.two.sync()


def told(*signs: str) -> bool:
    """Whether these are the misuses, which are forgiven."""
    found = cuda_stub.misuses()
    assert len(found) == len(signs), found
    return all(sign in line for sign, line in zip(signs, found, strict=True))


def test_nobody_but_cuda_core_finds_it(bench: Bench) -> None:
    try:
        other = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    assert not hasattr(other, "stubReset")  # this machine's own


def test_work_is_done_late_and_in_order(bench: Bench) -> None:
    bench.bind()
    source, target = bench.pinned(3), bench.pinned(0)
    bench.x.copy_from(source, bench.one)
    assert bench.run(bench.one)
    target.copy_from(bench.y, bench.one)
    assert target.array.tolist() == [0, 0]
    bench.one.sync()
    assert target.array.tolist() == [6, 6]


def test_work_is_done_at_once_where_it_is_eager(bench: Bench) -> None:
    cuda_stub.reset("eager")
    bench.x.copy_from(bench.pinned(3), bench.one)
    assert bench.seen(bench.x) == [3, 3]
    assert cuda_stub.counts()["pending"] == 0


def test_memory_that_is_filled_again_too_early_gives_wrong_values(bench: Bench) -> None:
    source = bench.pinned(1)
    bench.x.copy_from(source, bench.one)
    source.array[:] = 2
    bench.one.sync()
    assert bench.seen(bench.x) == [2, 2]


@pytest.mark.parametrize("order", cuda_stub.ORDERS)
def test_two_streams_need_an_order_whenever_the_work_is_done(bench: Bench, order: str) -> None:
    cuda_stub.reset(order)
    bench.bind()
    bench.x.clear(bench.one)
    bench.run(bench.two)
    assert told("run y touches 8 bytes without an order")
    bench.x.clear(bench.one)  # after the run that reads it
    assert told("fill touches 8 bytes without an order")
    bench.order(bench.one, bench.two)
    assert bench.run(bench.two)
    bench.two.sync()
    bench.x.clear(bench.one)  # the host has waited
    assert told()


def test_memory_is_there_in_the_order_of_its_stream(bench: Bench) -> None:
    array = bench.device.array((2,), np.float32, bench.one)
    array.clear(bench.two)
    with pytest.raises(EngineError, match="ILLEGAL_ADDRESS"):
        bench.two.sync()
    assert told("fill touches 8 bytes without an order", "fill finds its memory not allocated yet")
    cuda_stub.reset()


def test_a_context_runs_once_at_a_time_and_outlives_its_runs(bench: Bench) -> None:
    bench.bind()
    bench.run(bench.one)
    assert bench.context is not None
    other = bench.device.array((2,), np.float32, bench.two)
    bench.order(bench.one, bench.two)
    bench.context.set_tensor_address("y", other.address)
    bench.context.version -= 1  # as if it allowed another address while it runs
    bench.run(bench.two)
    bench.run(bench.one)
    assert "without an order" in cuda_stub.misuses()[0]
    bench.run(bench.one)
    bench.context = None
    assert told("memory of a context goes while the device may still work", "run y finds its memory freed")
    cuda_stub.reset()


def test_shapes_and_addresses(bench: Bench) -> None:
    assert bench.context is not None
    assert not bench.run(bench.one)
    assert "was not set" in bench.log.lines[-1]
    assert not bench.context.set_input_shape("x", (5,))
    assert "outside profile" in bench.log.lines[-1]
    bench.bind()
    assert bench.context.set_input_shape("x", (3,))
    with pytest.raises(MisuseError, match="x lies in no memory of the device, or in too little"):
        bench.run(bench.one)
    bench.bind()
    bench.context.set_tensor_address("x", bench.pinned(0).array.ctypes.data)
    with pytest.raises(MisuseError, match="x lies in no memory of the device"):
        bench.run(bench.one)
    with pytest.raises(MisuseError, match="default stream"):
        bench.context.execute_async_v3(0)


def test_memory_that_was_freed(bench: Bench) -> None:
    bench.bind()
    bench.x.close()
    bench.one.sync()
    with pytest.raises(MisuseError, match="no memory of the device"):
        bench.run(bench.one)
    source = bench.pinned(0)
    bench.y.copy_from(source, bench.one)
    source.close()
    assert told("page-locked memory goes while the device", "copy finds its memory freed")
    cuda_stub.reset()


def test_a_thread_uses_the_device_that_it_has_made_its_own(bench: Bench) -> None:
    faults: list[EngineError] = []

    def work() -> None:
        try:
            bench.x.clear(bench.one)
        except EngineError as error:
            faults.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "CUDA_ERROR_INVALID_CONTEXT" in faults[0].message


def test_graphs_need_a_first_run_and_an_unchanged_context(bench: Bench) -> None:
    bench.bind()

    def refused() -> None:
        assert not bench.run(bench.one)
        raise EngineError("refused")

    with pytest.raises(EngineError, match="refused"):
        bench.one.capture(refused)
    bench.run(bench.one)
    graph = bench.one.capture(lambda: bool(bench.run(bench.one)))
    bench.x.clear(bench.one)
    graph.launch(bench.one)
    bench.one.sync()
    assert bench.seen(bench.y) == [0, 0]
    assert bench.context is not None
    bench.context.set_tensor_address("x", bench.y.address)
    graph.launch(bench.one)
    assert told("whose context was changed or destroyed")
    bench.bind()
    bench.run(bench.one)
    again = bench.one.capture(lambda: bool(bench.run(bench.one)))
    bench.y.close()
    bench.one.sync()
    again.launch(bench.one)
    assert told("run y finds its memory freed")
    cuda_stub.reset()


def test_branches_of_a_graph_need_an_order(bench: Bench) -> None:
    bench.bind()
    bench.run(bench.one)

    def enqueue(*, clash: bool) -> None:
        bench.order(bench.one, bench.two)
        if clash:
            bench.x.clear(bench.one)
        bench.run(bench.two)
        bench.order(bench.two, bench.one)

    bench.one.capture(lambda: enqueue(clash=False))
    assert told()
    bench.one.capture(lambda: enqueue(clash=True))
    assert told("touches 8 bytes without an order")


def test_a_capture_takes_no_waiting_and_must_be_joined(bench: Bench) -> None:
    bench.bind()
    bench.run(bench.one)
    with pytest.raises(EngineError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        bench.one.capture(bench.one.sync)

    def forked() -> None:
        bench.order(bench.one, bench.two)
        bench.run(bench.two)

    with pytest.raises(EngineError, match="CUDA_ERROR_STREAM_CAPTURE_UNJOINED"):
        bench.one.capture(forked)
    bench.one.sync()


def test_a_fault_of_the_device_is_for_good(bench: Bench) -> None:
    cuda_stub.fail("cuMemsetD8Async", 700)
    for _ in range(2):
        with pytest.raises(EngineError, match="CUDA refuses: CUDA_ERROR_ILLEGAL_ADDRESS") as info:
            bench.x.clear(bench.one)
        assert "start the command again" in info.value.hint
    cuda_stub.reset()
    bench.x.clear(bench.one)


def test_host_code_of_plans(bench: Bench, tmp_path: Path) -> None:
    runtime = engine_library().Runtime(bench.log)
    with pytest.raises(MisuseError, match="host code"):
        runtime.deserialize_cuda_engine(plan_bytes(tmp_path / "double.onnx"))
