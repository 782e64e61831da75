"""The core of sampling: one guided step over a set of slots, each at its own place in its own schedule."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from admtrt.runtime.noise import second_noise, step_noise
from admtrt.runtime.slots import GUIDE
from admtrt.schedule.edits import EDIT, EDIT_GRAPHS
from admtrt.schedule.table import UPDATE, UPDATE_FULL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from admtrt.contract import GraphName
    from admtrt.runtime.slots import Array, Images, Slots
    from admtrt.schedule.edits import EditGraph
    from admtrt.schedule.table import SamplingSchedule

_EDITING = [EDIT.index(name) for name in ("keep", "renoise")]
_NOISY = [EDIT.index(name) for name in ("noise", "renoise")]


class Denoiser(Protocol):
    """The graphs as functions on arrays; a backend over a bundle is one, PyTorch modules are another."""

    def run(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every output of one graph by name, owned by the caller.

        Inputs and outputs are those of :mod:`admtrt.contract`.
        """
        ...


@dataclass(frozen=True, eq=False)
class StepInputs:
    """What one evaluation of every slot takes besides its state and the conditioning.

    Attributes:
        t: float32 [N], in the model's units.
        coefficients: float32 [N, len(UPDATE_FULL)], see :mod:`admtrt.schedule.table`.
        guided: bool [N], whose evaluation uses the classifier's gradient.
        noise_steps: the steps that name each slot's noise, or None where no slot's evaluation adds any.
        full: whether any slot's schedule needs the graph ``update_full``.
        dynamic: whether any slot's evaluation needs the graph ``threshold``.
        edits: float32 [N, len(EDIT)] of each graph that edits any slot's next state, zeros for other slots.
        steps: evaluations that each slot has still to come, which name its noise.
    """

    t: NDArray[np.float32]
    coefficients: NDArray[np.float32]
    guided: NDArray[np.bool_]
    noise_steps: list[int] | None
    full: bool
    dynamic: bool
    edits: dict[EditGraph, NDArray[np.float32]]
    steps: list[int]

    @property
    def of_update(self) -> NDArray[np.float32]:
        """The coefficients of the graph ``update``, float32 [N, len(UPDATE)]."""
        return np.ascontiguousarray(self.coefficients[:, : len(UPDATE)])

    @property
    def clip(self) -> NDArray[np.float32]:
        """The bound of x_0 of each slot, float32 [N]."""
        return np.ascontiguousarray(self.coefficients[:, UPDATE_FULL.index("clip")])


def step_inputs(slots: Slots) -> StepInputs:
    """The inputs of the slots' next evaluation. No slot may be finished."""
    rows = list(zip(slots.schedules, slots.position.tolist(), strict=True))
    steps = [int(schedule.step[i]) for schedule, i in rows]
    return StepInputs(
        t=np.array([schedule.model_t[i] for schedule, i in rows], dtype=np.float32),
        coefficients=np.stack([schedule.coefficients[i] for schedule, i in rows]),
        guided=np.array([schedule.guided[i] for schedule, i in rows]) & (GUIDE in slots.conditions),
        noise_steps=steps if any(schedule.stochastic[i] for schedule, i in rows) else None,
        full=slots.full,
        dynamic=any(schedule.dynamic[i] for schedule, i in rows),
        edits=_edit_columns(rows),
        steps=steps,
    )


def _edit_columns(rows: list[tuple[SamplingSchedule, int]]) -> dict[EditGraph, NDArray[np.float32]]:
    columns = np.stack([schedule.edits[i] for schedule, i in rows])
    by_graph = {}
    for graph in EDIT_GRAPHS:
        own = np.array([schedule.edit_graph == graph for schedule, _ in rows])
        if columns[own][:, _EDITING].any():
            by_graph[graph] = columns * own[:, None].astype(np.float32)
    return by_graph


def draw_noise(slots: Slots, inputs: StepInputs) -> Images | None:
    """The noise of a step, float32 [N, C, H, W], or None where no slot's step is stochastic."""
    if inputs.noise_steps is None:
        return None
    return step_noise(slots.seeds, inputs.noise_steps, slots.x.shape[1:], stage=slots.stage)


def draw_second_noise(slots: Slots, inputs: StepInputs) -> Images | None:
    """The noise of the edits of a step, float32 [N, C, H, W], or None where no slot's edit adds any."""
    if not any(columns[:, _NOISY].any() for columns in inputs.edits.values()):
        return None
    return second_noise(slots.seeds, inputs.steps, slots.x.shape[1:], stage=slots.stage)


def advance(slots: Slots, denoiser: Denoiser, guided_sizes: Sequence[int] = ()) -> None:
    """Take one evaluation of every slot, in place. No slot may be finished.

    Args:
        slots: the samples.
        denoiser: the graphs.
        guided_sizes: batches to which the guided slots are filled up where others are not guided; powers of
            two where none is given or large enough.

    The gradient is computed for the slots whose evaluation is guided, noise where any slot's adds some. Slots
    of solvers with memory and of others may share a batch, which then runs ``update_full``. States are edited
    where a slot's schedule says so.
    """
    inputs = step_inputs(slots)
    out = denoiser.run("unet", _feeds(slots, inputs, "unet"))["out"]
    z = draw_noise(slots, inputs)
    given = {"x": slots.x, "out": out, "grad": _gradient(slots, inputs, denoiser, guided_sizes)}
    noise = {"noise": np.zeros_like(slots.x) if z is None else z}
    if not inputs.full:
        results = denoiser.run("update", {**given, **noise, "coefficients": inputs.of_update})
    else:
        row = {"coefficients": inputs.coefficients}
        r = denoiser.run("threshold", {**given, **row})["r"] if inputs.dynamic else inputs.clip
        memory = {"saved": slots.saved, "h1": slots.x_0, "h2": slots.h2}
        results = denoiser.run("update_full", {**given, **noise, **memory, "r": r, **row})
        slots.saved = results["saved_next"]
    slots.x, slots.x_0, slots.h2 = results["x_prev"], results["pred_x0"], slots.x_0
    slots.x = _edited(slots, inputs, denoiser)
    slots.position += 1


def _edited(slots: Slots, inputs: StepInputs, denoiser: Denoiser) -> Images:
    x = slots.x
    if not inputs.edits:
        return x
    z2 = draw_second_noise(slots, inputs)
    noise = {"noise2": np.zeros_like(x) if z2 is None else z2}
    for graph, columns in inputs.edits.items():
        feeds = {"x_prev": x, **slots.conditions[graph], **noise, "coefficients": columns}
        x = denoiser.run(graph, feeds)["x_edited"]
    return x


def _feeds(slots: Slots, inputs: StepInputs, graph: GraphName) -> dict[str, Array]:
    return {"x": slots.x, "t": inputs.t, **slots.conditions.get(graph, {})}


def _gradient(slots: Slots, inputs: StepInputs, denoiser: Denoiser, sizes: Sequence[int]) -> Images:
    """The gradient of the slots whose step is guided, zeros for the others.

    Where some are not, the guided ones are gathered, and filled up by copies of the last one: backends
    compile each size, and so meet few.
    """
    rows = np.flatnonzero(inputs.guided)
    grad = np.zeros_like(slots.x)
    if len(rows) == 0:
        return grad
    feeds = _feeds(slots, inputs, GUIDE)
    if len(rows) == len(slots):
        return denoiser.run(GUIDE, feeds)["grad"]
    size = min(guided_size(len(rows), sizes), len(slots))
    gathered = np.pad(rows, (0, size - len(rows)), mode="edge")
    results = denoiser.run(GUIDE, {name: values[gathered] for name, values in feeds.items()})
    grad[rows] = results["grad"][: len(rows)]
    return grad


def guided_size(count: int, sizes: Sequence[int] = ()) -> int:
    """The batch that ``count`` guided slots among others are filled up to, see :func:`advance`."""
    return min((size for size in sizes if size >= count), default=1 << (count - 1).bit_length())


class HeldSlots(Protocol):
    """Slots whose x stays where the denoiser computes, until it is read.

    Between the steps nothing of the slots may be changed but by :meth:`replace`.
    """

    def advance(self) -> None:
        """Take one step of every slot, without waiting for its result. No slot may be finished."""
        ...

    def read(self) -> None:
        """Wait for the last step and bring ``x`` and ``x_0`` of the slots up to date, as new arrays."""
        ...

    def replace(self, rows: Sequence[int], slots: Slots) -> None:
        """Put other samples in place of these rows, here and on the device; see :meth:`Slots.replace`.

        Raises:
            ValueError: as there.
        """
        ...


@runtime_checkable
class ResidentDenoiser(Denoiser, Protocol):
    """A denoiser that can keep x on its device between the steps."""

    def hold(self, slots: Slots) -> AbstractContextManager[HeldSlots]:
        """Take the slots to the device; what was not read when the block ends is lost."""
        ...


class _HostSlots:
    """Slots in host memory, advanced by a denoiser on arrays."""

    def __init__(self, slots: Slots, denoiser: Denoiser, guided_sizes: Sequence[int]) -> None:
        self._slots = slots
        self._denoiser = denoiser
        self._guided_sizes = guided_sizes

    def advance(self) -> None:
        advance(self._slots, self._denoiser, self._guided_sizes)

    def read(self) -> None:
        """Nothing is left to do: every step ends in host memory."""

    def replace(self, rows: Sequence[int], slots: Slots) -> None:
        self._slots.replace(rows, slots)


def hold(
    slots: Slots, denoiser: Denoiser, guided_sizes: Sequence[int] = ()
) -> AbstractContextManager[HeldSlots]:
    """The slots on the denoiser's device where it can keep them there, else in host memory.

    ``guided_sizes`` are as for :func:`advance`; on a device a step has one size.
    """
    if isinstance(denoiser, ResidentDenoiser):
        return denoiser.hold(slots)
    return nullcontext(_HostSlots(slots, denoiser, guided_sizes))
