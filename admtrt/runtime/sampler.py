"""The core of sampling: one guided step of a set of slots, each at its own position of its own schedule."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from admtrt.contract import CLASSIFIER_GRADIENT, GUIDE_CLIP, LEVEL_INPUT, X0_WEIGHTS, graph_of, guide_input
from admtrt.runtime.noise import second_noise, step_noise
from admtrt.schedule.edits import EDIT, EDIT_GRAPHS
from admtrt.schedule.guides import GUIDE_GRAPH
from admtrt.schedule.table import UPDATE_FULL

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from admtrt.contract import GraphName, Guides
    from admtrt.runtime.slots import Array, Images, Slots
    from admtrt.schedule.edits import EditGraph
    from admtrt.schedule.table import SamplingSchedule

_EDITING = [EDIT.index(name) for name in ("keep", "renoise")]
_NOISY = [EDIT.index(name) for name in ("noise", "renoise")]


class Denoiser(Protocol):
    """Runs graphs on arrays. Implemented by the backends, and over PyTorch modules."""

    def run(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run one graph. Returns every output by name; the caller owns the arrays.

        Inputs and outputs are those of :mod:`admtrt.contract`.
        """
        ...


class StepInputs(NamedTuple):
    """Inputs of one evaluation of every slot, besides its state and conditioning.

    Attributes:
        t: float32 [N], the timestep in the model's units.
        coefficients: of the update graph, float32 [N, columns]: those of ``update`` or, if ``full``, those of
            ``update_full`` followed by the columns of every guide of the bundle.
        guided: bool [N], True for slots whose evaluation uses the classifier's gradient.
        guides: for each other guide in use, bool [N], True for slots whose evaluation uses it.
        of_losses: inputs of guides by a loss of x_0, float32 [N] each, except ``guide_clip``.
        guide_clips: ``guide_clip`` of each such guide, float32 [N].
        noise_steps: the step number of each slot's noise, or None if no slot's evaluation adds noise.
        second_noise_steps: the same for the noise of edits.
        full: whether any slot's schedule needs the graph ``update_full``.
        dynamic: whether any slot's evaluation needs the graph ``threshold``.
        edits: coefficients of each edit graph in use, float32 [N, len(EDIT)], zeros for other slots.
    """

    t: NDArray[np.float32]
    coefficients: NDArray[np.float32]
    guided: NDArray[np.bool_]
    noise_steps: list[int] | None
    second_noise_steps: list[int] | None
    full: bool
    dynamic: bool
    edits: dict[EditGraph, NDArray[np.float32]]
    guides: dict[str, NDArray[np.bool_]]
    guide_clips: dict[str, NDArray[np.float32]]
    of_losses: dict[str, NDArray[np.float32]]

    @property
    def clip(self) -> NDArray[np.float32]:
        """The clip of x_0 of each slot, float32 [N]."""
        return np.ascontiguousarray(self.coefficients[:, UPDATE_FULL.index("clip")])


def step_inputs(slots: Slots) -> StepInputs:
    """Collect the inputs of the slots' next evaluation. No slot may be finished."""
    places = _Places(slots)
    needs = places.read(lambda schedule: schedule.needs)
    guided, stochastic, dynamic = needs.T
    some_noise, some_dynamic = stochastic.any(), dynamic.any()
    edits = _edit_columns(places, slots)
    some_second = any(columns[:, _NOISY].any() for columns in edits.values())
    steps = places.read(lambda schedule: schedule.step).tolist() if some_noise or some_second else None
    return StepInputs(
        t=places.read(lambda schedule: schedule.model_t),
        coefficients=_coefficients(places, slots),
        guided=guided & (CLASSIFIER_GRADIENT in slots.conditions),
        noise_steps=steps if some_noise else None,
        second_noise_steps=steps if some_second else None,
        full=slots.full,
        dynamic=bool(some_dynamic),
        edits=edits,
        **_of_guides(places, slots),
    )


class _Places:
    """The position of every slot in its schedule. A schedule that all slots share is read in one go."""

    def __init__(self, slots: Slots) -> None:
        self._schedules = slots.schedules
        self._position = slots.position
        self._shared = len(set(slots.schedules)) == 1

    def read(self, column: Callable[[SamplingSchedule], Array]) -> Array:
        """Pick every slot's entry from an array with one entry per evaluation, [N, ...]."""
        if self._shared:
            return column(self._schedules[0])[self._position]
        rows = zip(self._schedules, self._position.tolist(), strict=True)
        return np.array([column(schedule)[place] for schedule, place in rows])


def _coefficients(places: _Places, slots: Slots) -> NDArray[np.float32]:
    if not slots.full:
        return places.read(lambda schedule: schedule.of_update)
    own = places.read(lambda schedule: schedule.coefficients)
    if not slots.guides:
        return own
    theirs = [places.read(partial(_guide_columns, name)) for name in slots.guides]
    return np.concatenate([own, *theirs], axis=1)


def _guide_columns(name: str, schedule: SamplingSchedule) -> NDArray[np.float32]:
    return schedule.guide(name).columns


def _guide_active(name: str, schedule: SamplingSchedule) -> NDArray[np.bool_]:
    return schedule.guide(name).active


def _of_guides(places: _Places, slots: Slots) -> dict[str, Any]:
    """The fields of :class:`StepInputs` for guides other than the classifier."""
    active, clips = {}, {}
    for name in slots.guides:
        guided = places.read(partial(_guide_active, name))
        if guided.any():
            active[name] = guided
            clips[name] = np.array([schedule.guide(name).clip for schedule in slots.schedules], np.float32)
    return {"guides": active, "guide_clips": clips, "of_losses": _of_losses(places) if active else {}}


def _of_losses(places: _Places) -> dict[str, NDArray[np.float32]]:
    weights = places.read(lambda schedule: schedule.x0_weights)
    sigma = places.read(lambda schedule: schedule.sigma)
    noise = np.divide(sigma, np.hypot(1.0, sigma), out=np.ones_like(sigma), where=np.isfinite(sigma))
    named = zip((*X0_WEIGHTS, LEVEL_INPUT), (*weights.T, noise), strict=True)
    return {name: np.ascontiguousarray(numbers, np.float32) for name, numbers in named}


def _edit_columns(places: _Places, slots: Slots) -> dict[EditGraph, NDArray[np.float32]]:
    by_graph: dict[EditGraph, NDArray[np.float32]] = {}
    if not any(schedule.edit_graph for schedule in slots.schedules):
        return by_graph
    columns = places.read(lambda schedule: schedule.edits)
    for graph in EDIT_GRAPHS:
        own = np.array([schedule.edit_graph == graph for schedule in slots.schedules])
        if columns[own][:, _EDITING].any():
            by_graph[graph] = columns * own[:, None].astype(np.float32)
    return by_graph


def draw_noise(slots: Slots, inputs: StepInputs) -> Images | None:
    """The noise of a step, float32 [N, C, H, W], or None if no slot's step is stochastic."""
    if inputs.noise_steps is None:
        return None
    return step_noise(slots.seeds, inputs.noise_steps, slots.x.shape[1:], stage=slots.stage)


def draw_second_noise(slots: Slots, inputs: StepInputs) -> Images | None:
    """The noise of a step's edits, float32 [N, C, H, W], or None if no slot's edit adds noise."""
    if inputs.second_noise_steps is None:
        return None
    return second_noise(slots.seeds, inputs.second_noise_steps, slots.x.shape[1:], stage=slots.stage)


def advance(slots: Slots, denoiser: Denoiser, guided_sizes: Sequence[int] = ()) -> None:
    """Take one evaluation of every slot, in place. No slot may be finished.

    Args:
        slots: the samples.
        denoiser: the graphs.
        guided_sizes: batch sizes to pad the guided slots to when only some are guided. Powers of two if none
            is given or large enough.

    Gradients are computed for guided slots only; noise is drawn only if some slot adds it. If any slot's
    solver has memory, the batch runs ``update_full``. States are edited where a slot's schedule says so.
    """
    inputs = step_inputs(slots)
    given = {"x": slots.x, **_evaluated(slots, inputs, denoiser, guided_sizes)}
    z = draw_noise(slots, inputs)
    noise = {"noise": np.zeros_like(slots.x) if z is None else z}
    row = {"coefficients": inputs.coefficients}
    if not inputs.full:
        results = denoiser.run("update", {**given, **noise, **row})
    else:
        r = denoiser.run("threshold", {**given, **row})["r"] if inputs.dynamic else inputs.clip
        memory = {"saved": slots.saved, "h1": slots.x_0, "h2": slots.h2}
        results = denoiser.run("update_full", {**given, **noise, **memory, "r": r, **row})
        slots.saved = results["saved_next"]
    slots.x, slots.x_0, slots.h2 = results["x_prev"], results["pred_x0"], slots.x_0
    slots.x = _edited(slots, inputs, denoiser)
    slots.position += 1


def _evaluated(
    slots: Slots, inputs: StepInputs, denoiser: Denoiser, sizes: Sequence[int]
) -> dict[str, Images]:
    """Run the networks: ``out``, ``grad`` and, for ``update_full``, the tensor of every guide of the bundle.

    The graph of a loss of x_0 also returns the UNet's output, so the UNet runs only for the other samples.
    """
    results = {
        name: _on_rows(
            graph_of(name, slots.guides[name]), guide_feeds(slots, inputs, name), rows, denoiser, sizes
        )
        for name, rows in inputs.guides.items()
    }
    losses = [name for name in results if slots.guides[name].kind == "denoiser"]
    if losses:
        left = np.ones(len(slots), dtype=bool)
        out = np.zeros_like(results[losses[0]]["out"])
        for name in losses:
            out = np.where(_column(left), results[name]["out"], out)
            left &= ~inputs.guides[name]
        if left.any():
            rest = _on_rows("unet", _feeds(slots, inputs, "unet"), left, denoiser, sizes)["out"]
            out = np.where(_column(left), rest, out)
    else:
        out = denoiser.run("unet", _feeds(slots, inputs, "unet"))["out"]
    evaluated = {"out": out}
    if inputs.guided.any():
        gradient = _on_rows(
            CLASSIFIER_GRADIENT, _feeds(slots, inputs, CLASSIFIER_GRADIENT), inputs.guided, denoiser, sizes
        )
        evaluated["grad"] = gradient["grad"]
    else:
        evaluated["grad"] = np.zeros_like(slots.x)
    for name, guide in slots.guides.items() if inputs.full else ():
        tensor = guide_input(name, guide)
        if name in results:
            evaluated[tensor] = results[name][tensor.partition(".")[0]]
        else:
            channels = out.shape[1] if guide.network is None else guide.network.out_channels
            like = np.zeros((len(slots), channels, *out.shape[2:]), np.float32)
            evaluated[tensor] = like if guide.kind == "reference" else np.zeros_like(slots.x)
    return evaluated


def runs_of(schedule: SamplingSchedule, guides: Guides) -> dict[GraphName, int]:
    """Number of times that :func:`advance` runs each graph for a sample; no graphs that it does not run.

    Args:
        schedule: the sample's schedule.
        guides: the bundle's guides other than the classifier.
    """
    runs: Counter[GraphName] = Counter()
    plain = np.ones(len(schedule), dtype=bool)
    for name, rows in schedule.guides.items():
        runs[graph_of(name, guides[name])] += int(rows.active.sum())
        if guides[name].kind == "denoiser":
            plain &= ~rows.active  # the graph of a loss of x_0 includes the UNet
    runs["unet"] += int(plain.sum())
    runs[CLASSIFIER_GRADIENT] += int(schedule.guided.sum())
    runs["update_full" if schedule.full else "update"] += len(schedule)
    runs["threshold"] += int(schedule.dynamic.sum())
    if schedule.edit_graph is not None:
        runs[schedule.edit_graph] += len(schedule)
    return {graph: count for graph, count in runs.items() if count}


def _column(rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return rows[:, None, None, None]


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


def gathered_size(count: int, batch: int, sizes: Sequence[int] = ()) -> int:
    """The padded batch size of a gradient if ``count`` samples of a batch are guided, see :func:`advance`."""
    powers = 1 << (count - 1).bit_length()
    return min(min((size for size in sizes if size >= count), default=powers), batch)


def guide_feeds(slots: Slots, inputs: StepInputs, name: str) -> dict[str, Array]:
    """The inputs of a guide's graph."""
    guide, feeds = slots.guides[name], _feeds(slots, inputs, f"{GUIDE_GRAPH}{name}")
    if guide.kind == "denoiser":
        feeds |= {weight: inputs.of_losses[weight] for weight in X0_WEIGHTS}
        feeds[GUIDE_CLIP] = inputs.guide_clips[name]
        if guide.level_input:
            feeds[LEVEL_INPUT] = inputs.of_losses[LEVEL_INPUT]
    return feeds


def _on_rows(
    graph: GraphName,
    feeds: Mapping[str, Array],
    chosen: NDArray[np.bool_],
    denoiser: Denoiser,
    sizes: Sequence[int],
) -> dict[str, Array]:
    """Run a graph for some rows; the other rows of its outputs are zeros.

    A subset of rows is gathered and padded to a power of two with copies of the last one, so that backends
    that compile every batch size compile only a few.
    """
    if chosen.all():
        return denoiser.run(graph, feeds)
    rows, count = np.flatnonzero(chosen), len(chosen)
    size = gathered_size(len(rows), count, sizes)
    gathered = np.pad(rows, (0, size - len(rows)), mode="edge")
    results = denoiser.run(graph, {name: values[gathered] for name, values in feeds.items()})
    spread = {}
    for name, values in results.items():
        spread[name] = np.zeros((count, *values.shape[1:]), values.dtype)
        spread[name][rows] = values[: len(rows)]
    return spread


class HeldSlots(Protocol):
    """Slots whose x stays on the denoiser's device until it is read.

    Between steps, only :meth:`replace` may change the slots.
    """

    def advance(self) -> None:
        """Take one step of every slot, without waiting for its result. No slot may be finished."""
        ...

    def read(self) -> None:
        """Wait for the last step and update ``x`` and ``x_0`` of the slots with new arrays."""
        ...

    def replace(self, rows: Sequence[int], slots: Slots) -> None:
        """Replace the samples in these rows, here and on the device; see :meth:`Slots.replace`.

        Raises:
            ValueError: as there.
        """
        ...


@runtime_checkable
class ResidentDenoiser(Denoiser, Protocol):
    """A denoiser that can keep x on its device between steps."""

    def hold(self, slots: Slots) -> AbstractContextManager[HeldSlots]:
        """Move the slots to the device. Results that were not read before the block ends are lost."""
        ...


class _HostSlots:
    """The fallback: slots in host memory."""

    def __init__(self, slots: Slots, denoiser: Denoiser, guided_sizes: Sequence[int]) -> None:
        self._slots = slots
        self._denoiser = denoiser
        self._guided_sizes = guided_sizes

    def advance(self) -> None:
        advance(self._slots, self._denoiser, self._guided_sizes)

    def read(self) -> None:
        """Do nothing: the results are in host memory already."""

    def replace(self, rows: Sequence[int], slots: Slots) -> None:
        self._slots.replace(rows, slots)


def hold(
    slots: Slots, denoiser: Denoiser, guided_sizes: Sequence[int] = ()
) -> AbstractContextManager[HeldSlots]:
    """Hold the slots on the denoiser's device if it supports that, else in host memory.

    Samples with guides other than the classifier are stepped in host memory. ``guided_sizes`` are as for
    :func:`advance`; a device uses its own sizes.
    """
    if isinstance(denoiser, ResidentDenoiser) and not any(one.guides for one in slots.schedules):
        return denoiser.hold(slots)
    return nullcontext(_HostSlots(slots, denoiser, guided_sizes))
