"""Samples in flight: the state that each carries from step to step, and how batches are formed."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from admtrt.contract import (
    CLASSIFIER_GRADIENT,
    GUIDE_CLIP,
    LEVEL_INPUT,
    NO_GUIDES,
    X0_WEIGHTS,
    GraphName,
    classifier_gradient_spec,
    event_shape,
    graph_of,
    guide_spec,
    unet_spec,
)
from admtrt.runtime.noise import initial_noise, step_noise
from admtrt.schedule.guides import GUIDE_GRAPH

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from admtrt.config import ClassifierConfig, UNetConfig
    from admtrt.contract import GraphSpec, Guides
    from admtrt.schedule.table import SamplingSchedule

Array = NDArray[Any]
Images = NDArray[np.float32]
Labels = NDArray[np.int64]
Conditions = dict[GraphName, dict[str, Array]]
"""Further inputs of graphs, by graph and tensor, with one row per sample."""

_OF_A_STEP = ("x", "t", *X0_WEIGHTS, GUIDE_CLIP, LEVEL_INPUT)
_MEMORY = ("x_0", "saved", "h2")


@dataclass
class Slots:
    """Samples in flight, rows of one batch; row i is at ``position[i]`` of ``schedules[i]``.

    Attributes:
        x: float32 [N, *event], the current x_t.
        schedules: the schedule of each sample.
        position: int64 [N], steps already done.
        seeds: one for each sample; the noise depends on it, the step and ``stage`` alone.
        conditions: further inputs of each graph; ``classifier_gradient`` is among them if and only if samples
            may be guided.
        stage: stage of a cascade, see :mod:`admtrt.runtime.noise`.
        guides: the bundle's guides other than the classifier. For a guide that may be used, ``conditions``
            has ``guide.NAME`` with all further inputs of its graph.
        x_0: the data prediction of the last evaluation, zeros before the first.
        saved, h2: further memory of the solvers, see :mod:`admtrt.schedule.table`; their ``h1`` is ``x_0``.
    """

    x: Images
    schedules: list[SamplingSchedule]
    position: NDArray[np.int64]
    seeds: list[int]
    conditions: Conditions
    stage: int = 0
    guides: Guides = field(default_factory=dict)
    x_0: Images = field(init=False)
    saved: Images = field(init=False)
    h2: Images = field(init=False)

    def __post_init__(self) -> None:
        # Zeros, not the values of an earlier sample: 0 * NaN is NaN.
        self.x_0, self.saved, self.h2 = (np.zeros_like(self.x) for _ in _MEMORY)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def finished(self) -> NDArray[np.bool_]:
        """True for samples that have taken their last step, bool [N]."""
        return self.position >= np.array([len(schedule) for schedule in self.schedules])

    @property
    def full(self) -> bool:
        """True where any sample needs the graph ``update_full``."""
        return any(schedule.full for schedule in self.schedules)

    def take(self, rows: Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]) -> Slots:
        """Copy these rows, by index or mask, with all state of their samples."""
        chosen = np.arange(len(self))[rows]
        taken = Slots(
            x=self.x[chosen],
            schedules=[self.schedules[row] for row in chosen],
            position=self.position[chosen],
            seeds=[self.seeds[row] for row in chosen],
            conditions={
                graph: {name: values[chosen] for name, values in given.items()}
                for graph, given in self.conditions.items()
            },
            stage=self.stage,
            guides=self.guides,
        )
        for name in _MEMORY:
            setattr(taken, name, getattr(self, name)[chosen])
        return taken

    @staticmethod
    def join(parts: Sequence[Slots]) -> Slots:
        """Concatenate copies of the parts, in order.

        A part without the conditions of a graph does not use that graph; its rows get zeros, which are valid
        labels.

        Raises:
            ValueError: if there is no part, stages or shapes differ, or a part whose schedules use a graph
                has no conditions for it while another has.
        """
        if not parts:
            raise ValueError("there are no slots to join")
        if len({part.stage for part in parts}) > 1:
            raise ValueError(f"slots of the stages {[part.stage for part in parts]} are not of one network")
        if any(dict(part.guides) != dict(parts[0].guides) for part in parts):
            raise ValueError("slots have different guides, and so are not of one bundle")
        joined = Slots(
            x=_joined("x", [part.x for part in parts]),
            schedules=[schedule for part in parts for schedule in part.schedules],
            position=np.concatenate([part.position for part in parts]),
            seeds=[seed for part in parts for seed in part.seeds],
            conditions=_joined_conditions(parts),
            stage=parts[0].stage,
            guides=parts[0].guides,
        )
        for name in _MEMORY:
            setattr(joined, name, np.concatenate([getattr(part, name) for part in parts]))
        return joined

    def replace(self, rows: Sequence[int], slots: Slots) -> None:
        """Replace the samples in these rows, with all their state.

        Raises:
            ValueError: if the numbers of rows and samples differ, or as :meth:`join`.
        """
        order = np.arange(len(self))
        replaced = order[list(rows)]
        if not len(rows) == len(set(replaced.tolist())) == len(slots):
            raise ValueError(f"{len(slots)} samples cannot take the place of rows {list(rows)}")
        order[replaced] = len(self) + np.arange(len(slots))
        vars(self).update(vars(Slots.join([self, slots]).take(order)))


def slots_for(
    unet: UNetConfig,
    classifier: ClassifierConfig | None,
    schedules: Sequence[SamplingSchedule],
    seeds: Sequence[int],
    *,
    labels: Labels | None = None,
    low_res: Images | None = None,
    guided: bool,
    latents: Images | None = None,
    images: Images | None = None,
    edits: Conditions | None = None,
    guides: Guides = NO_GUIDES,
    targets: Mapping[str, Mapping[str, Array]] = MappingProxyType({}),
) -> Slots:
    """Make slots for samples at the start of their schedules.

    Args:
        unet, classifier: configurations of the networks.
        schedules, seeds: one for each sample.
        labels: int64 [N], for networks that take labels.
        low_res: float32 [N, C, h, w] in [-1, 1], for an upsampler.
        guided: whether the classifier may guide the samples.
        latents: float32 [N, *event], x_T in place of noise drawn from the seeds.
        images: float32 [N, *event] in [-1, 1], for samples whose schedules start from an image.
        edits: inputs of the graphs that edit states, for samples whose schedules are edited.
        guides: the bundle's guides other than the classifier.
        targets: by guide and name, float32 [N, ...], of every guide that may guide the samples.

    Raises:
        ValueError: if an input of the networks is missing or has another shape.
    """
    event, stage = event_shape(unet), unet.low_res_size or 0
    x_T = initial_noise(seeds, event, stage=stage) if latents is None else latents
    for name, given in (("x_T", x_T), ("images", images)):
        if given is not None and (given.dtype != np.float32 or given.shape != (len(schedules), *event)):
            expected = f"expected float32 {(len(schedules), *event)}"
            raise ValueError(f"{name} is {given.dtype} {given.shape}; {expected}")
    return Slots(
        x=_first_states(schedules, seeds, x_T, images, stage),
        schedules=list(schedules),
        position=np.zeros(len(seeds), dtype=np.int64),
        seeds=list(seeds),
        conditions=conditions_for(
            unet, classifier, labels=labels, low_res=low_res, guided=guided, guides=guides, targets=targets
        )
        | (edits or {}),
        stage=stage,
        guides=guides,
    )


def _first_states(
    schedules: Sequence[SamplingSchedule],
    seeds: Sequence[int],
    x_T: Images,
    images: Images | None,
    stage: int,
) -> Images:
    """The first x of every sample: x_T, plus an image or the noise of churn if its schedule has them."""
    column = (-1, *[1] * (x_T.ndim - 1))
    scale, signal, noise = (
        np.array([getattr(schedule, f"init_{name}") for schedule in schedules], np.float32)
        for name in ("scale", "signal", "noise")
    )
    x = x_T * scale.reshape(column)
    if signal.any():
        if images is None:
            raise ValueError("samples begin at images, and there are none")
        x += images * signal.reshape(column)
    if noise.any():
        # Its noise has the number of an evaluation before the first.
        z = step_noise(seeds, [len(schedule) for schedule in schedules], x.shape[1:], stage=stage)
        x += z * noise.reshape(column)
    return x


def conditions_for(
    unet: UNetConfig,
    classifier: ClassifierConfig | None,
    *,
    labels: Labels | None,
    low_res: Images | None,
    guided: bool,
    guides: Guides = NO_GUIDES,
    targets: Mapping[str, Mapping[str, Array]] = MappingProxyType({}),
) -> Conditions:
    """The conditions of samples. Only this function knows which graph takes which; see :func:`slots_for`.

    Raises:
        ValueError: if an input of the networks is missing.
    """
    # ``num_classes`` of a UNet counts its null class, which cannot be requested.
    of_unet = {"y": unet.own_labels(labels), "low_res": low_res}
    conditions: Conditions = {"unet": _taken("unet", unet_spec(unet), of_unet)}
    if guided:
        if classifier is None:
            raise ValueError("samples cannot be guided without a classifier")
        conditions[CLASSIFIER_GRADIENT] = _taken(
            CLASSIFIER_GRADIENT, classifier_gradient_spec(classifier), {"y": labels}
        )
    for name, theirs in targets.items():
        guide, graph = guides[name], f"{GUIDE_GRAPH}{name}"
        given: dict[str, Array | None] = {**of_unet, **theirs}
        if guide.kind == "reference":
            network = guide.network or unet
            given["y"] = network.own_labels(labels)
            if graph_of(name, guide) == "unet" and labels is not None:
                given["y"] = np.full_like(labels, unet.null_class)
        conditions[graph] = _taken(graph, guide_spec(unet, guide), given)
    return conditions


def _taken(graph: GraphName, spec: GraphSpec, given: Mapping[str, Array | None]) -> dict[str, Array]:
    """A graph's inputs that do not change from step to step, by name."""
    taken = {}
    for tensor in spec.inputs:
        if tensor.name in _OF_A_STEP:
            continue
        values = given.get(tensor.name)
        if values is None:
            raise ValueError(f"graph '{graph}' takes '{tensor.name}', and there is none")
        taken[tensor.name] = values
    return taken


def _joined_conditions(parts: Sequence[Slots]) -> Conditions:
    joined: Conditions = {}
    for graph in dict.fromkeys(graph for part in parts for graph in part.conditions):
        known = next(part.conditions[graph] for part in parts if graph in part.conditions)
        for part in parts:
            if graph not in part.conditions and _uses(part, graph):
                raise ValueError(f"slots have no conditions of '{graph}', which their schedules use")
            if part.conditions.get(graph, known).keys() != known.keys():
                raise ValueError(f"slots give '{graph}' different inputs")
        joined[graph] = {
            name: _joined(name, [_rows(part, graph, name, like) for part in parts])
            for name, like in known.items()
        }
    return joined


def _rows(part: Slots, graph: GraphName, name: str, like: Array) -> Array:
    given: Mapping[str, Array] | None = part.conditions.get(graph)
    return np.zeros((len(part), *like.shape[1:]), like.dtype) if given is None else given[name]


def _uses(slots: Slots, graph: GraphName) -> bool:
    if graph == CLASSIFIER_GRADIENT:
        return any(schedule.guided.any() for schedule in slots.schedules)
    if graph.startswith(GUIDE_GRAPH):
        return any(graph.removeprefix(GUIDE_GRAPH) in schedule.guides for schedule in slots.schedules)
    return any(schedule.edit_graph == graph for schedule in slots.schedules)


def _joined(name: str, parts: list[Array]) -> Array:
    kinds = {(part.dtype, part.shape[1:]) for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"'{name}' of slots differs: {sorted(f'{dtype} {shape}' for dtype, shape in kinds)}")
    return np.concatenate(parts)
