"""The core of sampling: one guided step over a set of slots, each at its own place in its own schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from admtrt.runtime.noise import initial_noise, step_noise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from admtrt.schedule import SamplingSchedule

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


def advance(slots: Slots, denoiser: Denoiser) -> None:
    """Take one step of every slot, in place. No slot may be finished.

    The gradient is skipped where no slot's step is guided, the noise where no slot's step is stochastic.
    """
    from admtrt.schedule import COEFFICIENTS

    rows = list(zip(slots.schedules, slots.position.tolist(), strict=True))
    t = np.array([schedule.model_t[i] for schedule, i in rows], dtype=np.float32)
    coefficients = np.stack([schedule.coefficients[i] for schedule, i in rows])
    out = denoiser.unet(slots.x, t, slots.unet_y, slots.low_res)
    zeros = np.zeros_like(slots.x)
    guided = coefficients[:, [COEFFICIENTS.index(name) for name in _GUIDED_COLUMNS]].any()
    grad = (
        denoiser.classifier_gradient(slots.x, t, slots.guide_y)
        if guided and slots.guide_y is not None
        else zeros
    )
    stochastic = coefficients[:, COEFFICIENTS.index("noise")].any()
    steps = [int(schedule.step[i]) for schedule, i in rows]
    z = step_noise(slots.seeds, steps, slots.x.shape[1:], stage=slots.stage) if stochastic else zeros
    slots.x, slots.x_0 = denoiser.update(slots.x, out, grad, z, coefficients)
    slots.position += 1
