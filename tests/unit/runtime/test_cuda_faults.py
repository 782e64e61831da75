"""Faults of CUDA become EngineErrors, work under way is awaited, and nothing hides the first fault."""

from __future__ import annotations

import gc
import re
from typing import TYPE_CHECKING, Any

import cuda_stub
import numpy as np
import pytest
from bundles import CLASSIFIER, SAMPLER, UNET, pipeline
from engine_double import Context
from engine_rig import Rig

from admtrt.cli import run
from admtrt.config import DiffusionConfig
from admtrt.errors import EngineError
from admtrt.runtime.cuda import DeviceArray, PinnedArray, Stream
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.sampler import hold
from admtrt.runtime.slots import slots_for
from admtrt.runtime.trt.batch_buffers import StepKind
from admtrt.schedule.table import sampling_schedule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from admtrt.runtime.backends.tensorrt import TensorRTDenoiser
    from admtrt.runtime.slots import Slots
    from admtrt.runtime.trt.batch_buffers import BatchBuffers

FULL, FAILED, UNKNOWN = 2, 719, 999  # CUresult

OPENING = ("cuCtxSetCurrent",)
WORKING = (
    "cuEventCreate",
    "cuEventRecordWithFlags",
    "cuEventSynchronize",
    "cuGraphLaunch",
    "cuMemAllocFromPoolAsync",
    "cuMemAllocHost",
    "cuMemcpyAsync",
    "cuMemsetD8Async",
    "cuStreamCreateWithPriority",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
)
CAPTURING = ("cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiateWithFlags", "cuGraphUpload")
CLOSING = ("cuEventDestroy", "cuGraphExecDestroy", "cuMemFreeAsync", "cuMemFreeHost", "cuStreamDestroy")


@pytest.fixture(params=cuda_stub.ORDERS[:3])
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rig:
    made = Rig(monkeypatch, tmp_path, order=request.param)
    made.build()
    return made


def fault_of(rig: Rig) -> EngineError | None:
    """The error that sampling on the rig ends with, or None."""
    try:
        with rig.open() as denoiser:
            Pipeline(rig.bundle, denoiser)([0, 1, 0])
    except EngineError as error:
        return error
    return None


def slots(count: int = 2) -> Slots:
    schedule = sampling_schedule(DiffusionConfig(), SAMPLER.model_copy(update={"steps": "8"}))
    return slots_for(
        UNET, CLASSIFIER, [schedule] * count, [5] * count, labels=np.zeros(count, np.int64), guided=True
    )


def opened_buffers(rig: Rig) -> tuple[TensorRTDenoiser, BatchBuffers]:
    """An open denoiser, and its buffers for two samples."""
    denoiser = rig.open()
    return denoiser, denoiser.buffers_for(2)


@pytest.mark.parametrize("code", [FULL, FAILED, UNKNOWN])
@pytest.mark.parametrize("function", [*OPENING, *WORKING])
def test_every_refusal_is_an_error_with_a_hint(
    function: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(monkeypatch, tmp_path)
    rig.build()
    reached = 0
    for call in (1, 2, 5, 9):
        cuda_stub.reset()
        cuda_stub.fail(function, code, call=call)
        error = fault_of(rig)
        if error is not None:
            assert error.hint
            assert any(sign in error.message for sign in ("CUDA refuses: ", "is out of memory"))
        if error is not None and code == FULL and "Mem" in function:
            assert "--batch-size" in error.hint
        reached += any(line.startswith(f"fault: {function}") for line in cuda_stub.log())
        cuda_stub.misuses()  # a wait that failed cannot have been one
    assert reached


@pytest.mark.parametrize("function", CAPTURING)
def test_a_step_that_cannot_be_captured_runs_without_a_graph(rig: Rig, function: str) -> None:
    cuda_stub.fail(function, UNKNOWN)
    with rig.open() as denoiser:
        samples = Pipeline(rig.bundle, denoiser)([0, 1])
        assert "no CUDA graphs (CUDA refuses: CUDA_ERROR_UNKNOWN" in str(denoiser)
        assert "doctor" not in str(denoiser)  # a hint is no part of a sentence
    np.testing.assert_allclose(samples.x, pipeline("guided")([0, 1]).x, rtol=0, atol=2e-5)


@pytest.mark.parametrize("function", CLOSING)
def test_what_cannot_be_given_back_stops_nothing(rig: Rig, function: str) -> None:
    cuda_stub.fail(function, FAILED)
    error = fault_of(rig)
    assert error is None or "CUDA_ERROR_LAUNCH_FAILED" in error.message


def test_the_command_line_says_it_in_two_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rig = Rig(monkeypatch, tmp_path / "plans")
    rig.build()
    cuda_stub.fail("cuGraphLaunch", FAILED, call=2)
    given = [
        "sample",
        rig.bundle.path,
        "--out",
        tmp_path / "run",
        "--backend",
        "tensorrt",
        "--plans",
        rig.folder,
    ]
    assert run(list(map(str, [*given, "--classes", "0"]))) == 2
    gc.collect()  # the backend was not closed: its deletion must print nothing
    said = capfd.readouterr().err
    assert re.search(
        r"^error: CUDA refuses: CUDA_ERROR_LAUNCH_FAILED.*\n +The GPU serves this process no more", said, re.M
    )
    assert "Traceback" not in said  # cuda-core itself warns of memory that it cannot give back


def test_the_first_fault_is_the_one_that_is_told(rig: Rig) -> None:
    """After a failed step, the device also fails all calls that release memory."""

    def fail_in_a_step(denoiser: TensorRTDenoiser) -> None:
        with hold(slots(), denoiser) as held:
            held.advance()
            fail(denoiser)

    def fail(_: object) -> None:
        cuda_stub.fail("cuStreamSynchronize", FAILED)
        raise EngineError("the first of all")

    def closed_after(work: Callable[[TensorRTDenoiser], None]) -> None:
        cuda_stub.reset()
        with rig.open() as denoiser:
            denoiser.buffers_for(2)
            work(denoiser)

    for work in (fail_in_a_step, fail):
        with pytest.raises(EngineError, match="the first of all"):
            closed_after(work)


def test_a_device_that_fails_while_it_closes_says_so_and_keeps_nothing(rig: Rig) -> None:
    denoiser, _ = opened_buffers(rig)
    cuda_stub.fail("cuStreamSynchronize", FAILED)
    with pytest.raises(EngineError, match="LAUNCH_FAILED"):
        denoiser.close()
    assert not denoiser.buffers
    assert not denoiser.engines
    denoiser.close()


def test_all_buffers_close_where_the_first_does_not(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, first = opened_buffers(rig)
    second = denoiser.buffers_for(3)
    closed = []
    monkeypatch.setattr(second, "close", lambda: (closed.append("second"), _raise(EngineError("second"))))
    monkeypatch.setattr(first, "close", lambda: (closed.append("first"), _raise(EngineError("first"))))
    with pytest.raises(EngineError, match="second"):
        denoiser.close()
    assert closed == ["second", "first"]
    assert not denoiser.engines


def _raise(error: Exception) -> None:
    raise error


def test_slots_that_are_left_in_the_middle_leave_nothing_behind(rig: Rig) -> None:
    with rig.open() as denoiser:
        with hold(slots(), denoiser) as held:
            held.advance()
        before = cuda_stub.counts()
        with hold(slots(), denoiser) as held:
            for _ in range(3):
                held.advance()
        after = cuda_stub.counts()
        assert after["pending"] == 0
        assert {**after, "graphs": 0} == {**before, "graphs": 0}  # the step was captured


@pytest.mark.parametrize("output", ["out", "x_prev"])
def test_buffers_close_behind_what_was_enqueued_before_a_fault(
    rig: Rig, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is under way on its stream when the next run is refused; a context must not go before."""
    before = cuda_stub.counts()
    denoiser, opened = opened_buffers(rig)
    accept = Context.execute_async_v3
    opened.upload({"x": np.zeros((2, 1, 8, 8), np.float32), "t": np.full(2, 500, np.float32)})
    with monkeypatch.context() as patch:
        patch.setattr(
            Context,
            "execute_async_v3",
            lambda self, stream: (
                self._refuse("lost") if output in self.engine.outputs else accept(self, stream)
            ),
        )
        with pytest.raises(EngineError, match="lost"):
            opened.step(StepKind(gradient=opened.batch, full=False, dynamic=False))
    denoiser.close()
    assert cuda_stub.counts() == before


def test_what_waits_has_waited(rig: Rig) -> None:
    denoiser, opened = opened_buffers(rig)
    with denoiser:
        assert cuda_stub.counts()["pending"] == 0  # its contexts are prepared
        for value in (1, 2):
            opened.upload({"x": np.full((2, 1, 8, 8), value, np.float32)})
            assert cuda_stub.counts()["pending"] == 0
            array = opened.arrays["x"]
            found = np.frombuffer(cuda_stub.memory_at(array.address, 2 * 64 * 4), np.float32)
            assert (found == value).all()
        (read,) = opened.download(["x"], 2)
        assert (read == 2).all()
        assert cuda_stub.counts()["pending"] == 0


def test_what_was_never_written_is_finite(rig: Rig) -> None:
    denoiser, opened = opened_buffers(rig)
    with denoiser:
        for key in opened.arrays:
            (read,) = opened.download([key], 2)
            assert (read == 0).all(), key


@pytest.mark.parametrize(
    "call",
    [Stream.sync, Stream.close, DeviceArray.close, DeviceArray.clear, PinnedArray.close],
    ids=lambda call: call.__qualname__,
)
def test_what_is_used_after_it_was_given_back_is_refused(rig: Rig, call: Callable[..., Any]) -> None:
    """Closing twice is no fault, as cuda-core has it; anything else of a closed thing is."""
    denoiser, opened = opened_buffers(rig)
    with denoiser:
        device = denoiser.device
        stream = device.stream()
        made: Any = {
            "Stream": lambda: stream,
            "DeviceArray": lambda: device.array((2,), np.float32, opened.main),
            "PinnedArray": lambda: device.pinned((2,), np.float32),
        }[call.__qualname__.split(".")[0]]()
        made.inner.close()
        arguments = (opened.main,) if call is DeviceArray.clear else ()
        if call.__name__ == "close":
            call(made)
            return
        with pytest.raises(EngineError, match="CUDA refuses"):
            call(made, *arguments)
