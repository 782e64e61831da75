"""Targets of guides: the data that a loss compares images with, one row per sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from admtrt.contract import event_shape
from admtrt.errors import RequestError
from admtrt.images import from_uint8
from admtrt.runtime.images_in import checked_mask
from admtrt.runtime.operators import Operator
from admtrt.schedule.guides import LABELLED, WEIGHTS, unknown_guide

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from admtrt.bundle import Manifest
    from admtrt.runtime.slots import Array, Labels
    from admtrt.schedule.guides import GuideChoice, GuideConfig

OPERATOR = "operator"
"""Target of the guide ``linear`` that replaces its rows and columns."""
_MASKED = frozenset({"linear", "convolution", "fourier"})
_SHOWN = (
    "Give it by --target NAME=FILE, in Python by {name: array}, with a row for each sample or one for all."
)


@dataclass(frozen=True, eq=False)
class GuideTargets:
    """Targets by guide and name: float32 [N, ...], images also uint8 [N, H, W, C]; one row serves all.

    For the guide ``linear``, ``operator`` (see :class:`~admtrt.runtime.operators.Operator`) may replace
    ``rows`` and ``columns``; the measurement then has the size of the operator's result. By default the mask
    is all ones and the operator the identity.
    """

    given: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ready: bool = field(default=False, init=False, repr=False)  # checked and complete

    def checked(self, manifest: Manifest, chosen: Sequence[GuideChoice]) -> Self:
        """Check the targets and return them as the arrays that the graphs take.

        Args:
            manifest: the bundle's manifest.
            chosen: the guides that the sampler uses.

        Raises:
            RequestError: for a target that is missing, unknown, of another shape or type, or not finite.
        """
        names = [choice.name for choice in chosen]
        if self.ready and list(self.given) == names:
            return self
        unused = next((name for name in self.given if name not in names), None)
        if unused is not None:
            raise RequestError(f"targets were given of the guide '{unused}', which does not guide")
        event, checked = event_shape(manifest.network), {}
        for name in names:
            if name not in manifest.guides:
                raise unknown_guide(name, manifest.guides, "the bundle")
            checked[name] = _checked(name, manifest.guides[name], self.given.get(name, {}), event)
        return self._made(checked, ready=True)

    @property
    def lengths(self) -> dict[str, int]:
        """Number of rows of each target, by its name for messages."""
        return {f"rows of the target {name}": len(array) for name, array in self._arrays()}

    def part(self, rows: slice) -> Self:
        """The targets of some samples."""
        taken = {
            guide: {name: one if len(one) == 1 else one[rows] for name, one in targets.items()}
            for guide, targets in self.given.items()
        }
        return self._made(taken, ready=self.ready)

    def of_slots(
        self, count: int, labels: Labels | None, guides: Mapping[str, GuideConfig]
    ) -> dict[str, dict[str, Array]]:
        """One row per sample. Missing class weights are made from the labels.

        Raises:
            RequestError: as :meth:`check_labels`.
        """
        self.check_labels(labels, guides)
        full: dict[str, dict[str, Array]] = {}
        for guide, targets in self.given.items():
            full[guide] = {
                name: np.repeat(one, count, axis=0) if len(one) == 1 < count else one
                for name, one in targets.items()
            }
            config = guides[guide]
            if config.loss in LABELLED and WEIGHTS not in targets:
                (classes,) = config.targets[WEIGHTS]
                full[guide][WEIGHTS] = np.eye(classes, dtype=np.float32)[labels]
        return full

    def check_labels(self, labels: Labels | None, guides: Mapping[str, GuideConfig]) -> None:
        """Refuse guides that need classes if there are neither labels nor weights.

        Raises:
            RequestError: naming the first such guide.
        """
        for guide, targets in self.given.items() if labels is None else ():
            if guides[guide].loss in LABELLED and WEIGHTS not in targets:
                raise RequestError(
                    f"guide '{guide}' needs a class for each sample, or the target {WEIGHTS}",
                    hint="Give labels (--classes), or weights of all classes.",
                )

    @property
    def arrays(self) -> dict[str, Array]:
        """All targets, by guide and name."""
        return dict(self._arrays())

    def _made(self, given: Mapping[str, Mapping[str, Any]], *, ready: bool) -> Self:
        made = type(self)(given)
        object.__setattr__(made, "ready", ready)
        return made

    def _arrays(self) -> list[tuple[str, Array]]:
        return [
            (f"{guide}.{name}", one)
            for guide, targets in self.given.items()
            for name, one in targets.items()
            if name != OPERATOR
        ]


def target_sizes(
    guide: str, config: GuideConfig, name: str, operator: object, event: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of one row of a target as the user gives it. A measurement has the operator's result's shape.

    Raises:
        RequestError: if the guide has no such target, or the operator is unknown.
    """
    if name not in config.targets:
        listed = ", ".join(config.targets) or "none"
        raise RequestError(f"guide '{guide}' has no target '{name}'; it has {listed}", hint=_SHOWN)
    if name == "measurement" and isinstance(operator, str) and config.loss == "linear":
        return (event[0], *Operator(operator, event).result)
    return config.targets[name]


def _checked(
    guide: str, config: GuideConfig, given: Mapping[str, Any], event: tuple[int, ...]
) -> dict[str, NDArray[np.float32]]:
    targets = dict(given)
    text = targets.get(OPERATOR)
    operator = _operator(guide, targets, event) if config.loss == "linear" else None
    sizes_of = {name: target_sizes(guide, config, name, text, event) for name in (*targets, *config.targets)}
    if config.loss in _MASKED:
        if "mask" in targets:
            targets["mask"] = checked_mask(targets["mask"], event).astype(np.float32)
        else:
            targets["mask"] = np.ones((1, 1, *event[1:]), np.float32)
    if operator is not None:
        targets = {**operator.targets(), **targets}
    checked = {}
    for name, sizes in config.targets.items():
        if name not in targets:
            if config.loss in LABELLED and name == WEIGHTS:
                continue
            raise RequestError(
                f"guide '{guide}' needs the target '{name}', float32 [N, {', '.join(map(str, sizes))}]",
                hint=_SHOWN,
            )
        array = _array(f"target {guide}.{name}", targets[name], sizes_of[name])
        small = operator is not None and name == "measurement" and array.shape[1:] != sizes
        checked[name] = operator.filled(array) if small and operator is not None else array
    return checked


def _operator(guide: str, targets: dict[str, Any], event: tuple[int, ...]) -> Operator | None:
    """The operator of ``linear``; None if rows or columns are given directly."""
    text = targets.pop(OPERATOR, None)
    both = [name for name in ("rows", "columns") if name in targets]
    if text is None:
        return None if len(both) == 2 else Operator("identity", event)
    if both:
        raise RequestError(f"guide '{guide}': {OPERATOR} and {both[0]} exclude each other")
    if not isinstance(text, str):
        raise RequestError(f"guide '{guide}': {OPERATOR} is a {type(text).__name__}; expected a text as sr:4")
    return Operator(text, event)


def _array(name: str, given: Any, sizes: tuple[int, ...]) -> NDArray[np.float32]:
    array = np.asarray(given)
    if array.dtype == np.uint8 and len(sizes) == 3 and array.shape[1:] == (*sizes[1:], sizes[0]):
        array = from_uint8(array.transpose(0, 3, 1, 2))
    listed = ", ".join(map(str, sizes))
    if array.dtype != np.float32 or array.shape[1:] != sizes or array.ndim != len(sizes) + 1:
        images = f" or uint8 [N, {sizes[1]}, {sizes[2]}, {sizes[0]}]" if len(sizes) == 3 else ""
        raise RequestError(
            f"{name} is {array.dtype} {list(array.shape)}; expected float32 [N, {listed}]{images}",
            hint="Images are taken as they are: resize or convert them before.",
        )
    if len(array) == 0:
        raise RequestError(f"{name} has no row")
    if not np.isfinite(array).all():
        raise RequestError(f"{name} has values that are not finite")
    return np.ascontiguousarray(array)


NO_TARGETS = GuideTargets()
