"""Slots whose x stays on the GPU. Steps are enqueued ahead, each with inputs prepared in pinned memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from admtrt.contract import CLASSIFIER_GRADIENT
from admtrt.runtime.cuda import at_exit
from admtrt.runtime.sampler import draw_noise, draw_second_noise, step_inputs
from admtrt.runtime.trt.batch_buffers import GATHERED, StepKind, coefficients_of, fill_rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future
    from types import TracebackType

    from numpy.typing import NDArray

    from admtrt.runtime.cuda import CudaDevice
    from admtrt.runtime.sampler import StepInputs
    from admtrt.runtime.slots import Array, Slots
    from admtrt.runtime.trt.batch_buffers import BatchBuffers, Key

_STAGES = 2


class _StepInputs:
    """Pinned memory for one step's inputs."""

    def __init__(self, device: CudaDevice, buffers: BatchBuffers, stack: ExitStack) -> None:
        self._buffers = buffers
        self.arrays = {key: stack.enter_context(buffers.pinned(key)) for key in buffers.step_inputs}
        self.read = stack.enter_context(device.event())  # the GPU has read the memory: refill it

    def fill(self, slots: Slots, inputs: StepInputs) -> _Filled:
        """Draw a step's noise and write its inputs. Makes no CUDA calls."""
        guided, buffers = np.flatnonzero(inputs.guided), self._buffers
        mixed = 0 < len(guided) < len(slots)
        all_or_none = buffers.batch if len(guided) else 0
        kind = StepKind(
            gradient=buffers.gradient_size(len(guided)) if mixed else all_or_none,
            full=inputs.full,
            dynamic=inputs.dynamic,
            edits=tuple(inputs.edits),
        )
        given: dict[Key, Array] = {"t": inputs.t}
        if not kind.full:
            given[coefficients_of("update")] = inputs.coefficients
        else:
            given[coefficients_of("update_full")] = inputs.coefficients
            if not kind.dynamic:
                given["r"] = inputs.clip
        if mixed and kind.gradient < buffers.batch:
            taken = {"t": inputs.t, **slots.conditions[CLASSIFIER_GRADIENT]}
            given |= {(GATHERED, name): values[guided] for name, values in taken.items()}
        noise = draw_noise(slots, inputs)
        if noise is not None:
            given["noise"] = noise
        given |= {coefficients_of(graph): columns for graph, columns in inputs.edits.items()}
        second = draw_second_noise(slots, inputs)
        if second is not None:
            given["noise2"] = second
        for key, rows in given.items():
            fill_rows(self.arrays[key].array, rows)
        return _Filled(kind, tuple(given), guided if mixed else None)


class _Filled(NamedTuple):
    """A filled step: its kind, its arrays, and the guided rows if only some are guided."""

    kind: StepKind
    keys: tuple[Key, ...]
    guided: NDArray[np.int64] | None


class HeldOnDevice:
    """A :class:`~admtrt.runtime.sampler.HeldSlots` on :class:`BatchBuffers`.

    A thread draws the next step's noise while the GPU works. The host waits for the GPU in one case only:
    before it refills pinned memory that the GPU may not have read yet. Even then a whole step is still
    enqueued, so the GPU does not run idle.
    """

    def __init__(self, slots: Slots, device: CudaDevice, buffers: BatchBuffers) -> None:
        self._slots = slots
        self._device = device
        self._buffers = buffers
        self._taken = 0
        self._pending: Future[_Filled] | None = None
        self._fresh = True  # True if the slots are up to date with the GPU

    def __enter__(self) -> Self:
        self._upload()
        with ExitStack() as stack:
            self._stages = [_StepInputs(self._device, self._buffers, stack) for _ in range(_STAGES)]
            stack.push(at_exit(self._buffers.sync))  # before releasing memory that the GPU may still read
            self._drawer = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="noise"))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def advance(self) -> None:
        """See :class:`~admtrt.runtime.sampler.HeldSlots`."""
        slots, buffers = self._slots, self._buffers
        stage = self._stages[self._taken % _STAGES]
        filled = stage.fill(slots, step_inputs(slots)) if self._pending is None else self._pending.result()
        for key in filled.keys:
            buffers.send(key, stage.arrays[key])
        buffers.main.record(stage.read)
        buffers.step(filled.kind, filled.guided)
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
            slots.x, slots.x_0 = self._buffers.download(["x", "pred_x0"], len(slots))
            if slots.full:
                slots.saved, slots.h2 = self._buffers.download(["saved", "h2"], len(slots))
            self._fresh = True

    def replace(self, rows: Sequence[int], slots: Slots) -> None:
        """See :class:`~admtrt.runtime.sampler.HeldSlots`. Waits for the last step.

        Raises:
            ValueError: also if the new samples use guides other than the classifier.
        """
        if any(schedule.guides for schedule in slots.schedules):
            raise ValueError("samples with guides besides the classifier are not held on a device")
        if self._pending is not None:
            self._pending.result()  # the thread reads the slots
            self._pending = None  # it drew for the previous samples
        self.read()
        self._slots.replace(rows, slots)
        self._upload()

    def _upload(self) -> None:
        slots = self._slots
        arrays: dict[Key, Array] = {"x": slots.x}
        if slots.full:
            arrays |= {"saved": slots.saved, "h1": slots.x_0, "h2": slots.h2}
        for graph, given in slots.conditions.items():
            arrays |= {(graph, name): values for name, values in given.items()}
        self._buffers.upload(arrays)
