"""Slots whose x stays on the GPU: steps are enqueued ahead of it, each fed from memory filled beforehand."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from admtrt.runtime.cuda import at_exit
from admtrt.runtime.sampler import draw_noise, step_inputs
from admtrt.runtime.trt.lane import GUIDE_Y, fill_rows

if TYPE_CHECKING:
    from concurrent.futures import Future
    from types import TracebackType

    from admtrt.runtime.cuda import CudaDevice
    from admtrt.runtime.sampler import Slots, StepInputs
    from admtrt.runtime.trt.lane import Lane

_STAGES = 2


class _Stage:
    """Host memory for one step's inputs."""

    def __init__(self, device: CudaDevice, lane: Lane, stack: ExitStack) -> None:
        self.t = stack.enter_context(lane.pinned("t"))
        self.coefficients = stack.enter_context(lane.pinned("coefficients"))
        self.noise = stack.enter_context(lane.pinned("noise"))
        self.read = stack.enter_context(device.event())  # the GPU has read it: it may be filled again

    def fill(self, slots: Slots, inputs: StepInputs) -> StepInputs:
        """Write a step's inputs, its noise drawn now; calls nothing of CUDA."""
        fill_rows(self.t.array, inputs.t)
        fill_rows(self.coefficients.array, inputs.coefficients)
        noise = draw_noise(slots, inputs)
        if noise is not None:
            fill_rows(self.noise.array, noise)
        return inputs


class HeldOnDevice:
    """A :class:`~admtrt.runtime.sampler.HeldSlots` on a lane.

    The next step's noise is drawn by a thread while the GPU works. The host never waits for a step that the
    GPU could not go on without: only, before it draws, for the GPU to have read the memory drawn into, and
    then a whole step is still enqueued.
    """

    def __init__(self, slots: Slots, device: CudaDevice, lane: Lane) -> None:
        self._slots = slots
        self._device = device
        self._lane = lane
        self._taken = 0
        self._pending: Future[StepInputs] | None = None
        self._fresh = True  # what the slots hold is what the GPU holds

    def __enter__(self) -> Self:
        slots = self._slots
        given = {"x": slots.x, "y": slots.unet_y, GUIDE_Y: slots.guide_y, "low_res": slots.low_res}
        self._lane.upload({key: rows for key, rows in given.items() if rows is not None})
        with ExitStack() as stack:
            self._stages = [_Stage(self._device, self._lane, stack) for _ in range(_STAGES)]
            stack.push(at_exit(self._lane.sync))  # before memory goes that the GPU may still read
            self._drawer = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="noise"))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def advance(self) -> None:
        """See :class:`~admtrt.runtime.sampler.HeldSlots`."""
        slots, lane = self._slots, self._lane
        stage = self._stages[self._taken % _STAGES]
        inputs = stage.fill(slots, step_inputs(slots)) if self._pending is None else self._pending.result()
        lane.send("t", stage.t)
        lane.send("coefficients", stage.coefficients)
        if inputs.noise_steps is not None:
            lane.send("noise", stage.noise)
        lane.main.record(stage.read)
        lane.step(guided=inputs.guided)
        slots.position += 1
        self._taken += 1
        self._fresh = False
        self._pending = None
        if not slots.finished.any():
            following = self._stages[self._taken % _STAGES]
            following.read.sync()
            self._pending = self._drawer.submit(following.fill, slots, step_inputs(slots))

    def read(self) -> None:
        """See :class:`~admtrt.runtime.sampler.HeldSlots`."""
        if not self._fresh:
            slots = self._slots
            slots.x, slots.x_0 = self._lane.download(["x", "pred_x0"], len(slots))
            self._fresh = True
