"""The core of sampling: one guided step over a set of slots, each at its own place in its own schedule."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from admtrt.runtime.noise import initial_noise, step_noise
from admtrt.schedule.table import UPDATE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from admtrt.schedule.table import SamplingSchedule

    Images = NDArray[np.float32]
    Labels = NDArray[np.int64]


class Denoiser(Protocol):
    """The graphs as functions on arrays; a backend over a bundle is one, PyTorch modules are another.

    ``x`` is float32 [N, C, H, W], ``t`` float32 [N], ``y`` int64 [N] or None.
    """

    def unet(self, x: Images, t: NDArray[np.float32], y: Labels | None, low_res: Images | None) -> Images:
        """The network's output, [N, C or 2C, H, W]."""
        ...

    def classifier_gradient(self, x: Images, t: NDArray[np.float32], y: Labels) -> Images:
        """d log p(y | x_t) / dx_t, unscaled, [N, C, H, W]."""
        ...

    def update(
        self, x: Images, out: Images, grad: Images, noise: Images, coefficients: NDArray[np.float32]
    ) -> tuple[Images, Images]:
        """x_{t-1} and the predicted x_0; ``coefficients`` is [N, K], see :mod:`admtrt.schedule`."""
        ...


@dataclass
class Slots:
    """Samples in flight, rows of one batch; row i is at ``position[i]`` of ``schedules[i]``.

    Attributes:
        x: float32 [N, C, H, W], the current x_t.
        schedules: what each sample follows.
        position: int64 [N], steps already done.
        seeds: one for each sample; the noise depends on it, the step and ``stage`` alone.
        unet_y: int64 [N], labels of a class-conditional UNet, or None.
        guide_y: int64 [N], labels of the classifier's guidance, or None where nothing is guided.
        low_res: float32 [N, C, h, w], the conditioning of an upsampler, or None.
        stage: of a cascade, see :mod:`admtrt.runtime.noise`.
        x_0: the prediction of the last step, zeros before the first.
    """

    x: Images
    schedules: list[SamplingSchedule]
    position: NDArray[np.int64]
    seeds: list[int]
    unet_y: Labels | None = None
    guide_y: Labels | None = None
    low_res: Images | None = None
    stage: int = 0
    x_0: Images = field(init=False)

    def __post_init__(self) -> None:
        self.x_0 = np.zeros_like(self.x)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def finished(self) -> NDArray[np.bool_]:
        """Which samples have taken their last step, bool [N]."""
        return self.position >= np.array([len(schedule) for schedule in self.schedules])


def start_slots(
    shape: tuple[int, int, int],
    schedules: Sequence[SamplingSchedule],
    seeds: Sequence[int],
    *,
    unet_y: Labels | None = None,
    guide_y: Labels | None = None,
    low_res: Images | None = None,
    stage: int = 0,
) -> Slots:
    """Samples at the start of their schedules, x_T drawn from their seeds; ``shape`` is (C, H, W)."""
    return Slots(
        x=initial_noise(seeds, shape, stage=stage),
        schedules=list(schedules),
        position=np.zeros(len(seeds), dtype=np.int64),
        seeds=list(seeds),
        unet_y=unet_y,
        guide_y=guide_y,
        low_res=low_res,
        stage=stage,
    )


_GUIDED_COLUMNS = ("guidance", "x0_shift")


@dataclass(frozen=True, eq=False)
class StepInputs:
    """What one step of every slot takes besides x and the conditioning.

    Attributes:
        t: float32 [N], in the model's units.
        coefficients: float32 [N, K], see :mod:`admtrt.schedule`.
        guided: whether any slot's step uses the classifier's gradient.
        noise_steps: the steps that name each slot's noise, or None where no slot's step is stochastic.
    """

    t: NDArray[np.float32]
    coefficients: NDArray[np.float32]
    guided: bool
    noise_steps: list[int] | None


def step_inputs(slots: Slots) -> StepInputs:
    """The inputs of the slots' next step. No slot may be finished."""
    rows = list(zip(slots.schedules, slots.position.tolist(), strict=True))
    coefficients = np.stack([schedule.coefficients[i] for schedule, i in rows])
    guided = coefficients[:, [UPDATE.index(name) for name in _GUIDED_COLUMNS]].any()
    stochastic = coefficients[:, UPDATE.index("noise")].any()
    return StepInputs(
        t=np.array([schedule.model_t[i] for schedule, i in rows], dtype=np.float32),
        coefficients=coefficients,
        guided=bool(guided) and slots.guide_y is not None,
        noise_steps=[int(schedule.step[i]) for schedule, i in rows] if stochastic else None,
    )


def draw_noise(slots: Slots, inputs: StepInputs) -> Images | None:
    """The noise of a step, float32 [N, C, H, W], or None where no slot's step is stochastic."""
    if inputs.noise_steps is None:
        return None
    return step_noise(slots.seeds, inputs.noise_steps, slots.x.shape[1:], stage=slots.stage)


def advance(slots: Slots, denoiser: Denoiser) -> None:
    """Take one step of every slot, in place. No slot may be finished.

    The gradient is skipped where no slot's step is guided, the noise where no slot's step is stochastic.
    """
    inputs = step_inputs(slots)
    out = denoiser.unet(slots.x, inputs.t, slots.unet_y, slots.low_res)
    zeros = np.zeros_like(slots.x)
    guide = slots.guide_y if inputs.guided else None
    grad = zeros if guide is None else denoiser.classifier_gradient(slots.x, inputs.t, guide)
    z = draw_noise(slots, inputs)
    slots.x, slots.x_0 = denoiser.update(slots.x, out, grad, zeros if z is None else z, inputs.coefficients)
    slots.position += 1


class HeldSlots(Protocol):
    """Slots whose x stays where the denoiser computes, until it is read.

    Between the steps nothing of the slots may be changed.
    """

    def advance(self) -> None:
        """Take one step of every slot, without waiting for its result. No slot may be finished."""
        ...

    def read(self) -> None:
        """Wait for the last step and bring ``x`` and ``x_0`` of the slots up to date, as new arrays."""
        ...


@runtime_checkable
class ResidentDenoiser(Denoiser, Protocol):
    """A denoiser that can keep x on its device between the steps."""

    def hold(self, slots: Slots) -> AbstractContextManager[HeldSlots]:
        """Take the slots to the device; what was not read when the block ends is lost."""
        ...


class _HostSlots:
    """Slots in host memory, advanced by a denoiser on arrays."""

    def __init__(self, slots: Slots, denoiser: Denoiser) -> None:
        self._slots = slots
        self._denoiser = denoiser

    def advance(self) -> None:
        advance(self._slots, self._denoiser)

    def read(self) -> None:
        """Nothing is left to do: every step ends in host memory."""


def hold(slots: Slots, denoiser: Denoiser) -> AbstractContextManager[HeldSlots]:
    """The slots on the denoiser's device where it can keep them there, else in host memory."""
    if isinstance(denoiser, ResidentDenoiser):
        return denoiser.hold(slots)
    return nullcontext(_HostSlots(slots, denoiser))
