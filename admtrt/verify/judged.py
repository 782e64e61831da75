"""Judge by float64 where rounding is amplified and neither float32 side is right."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from admtrt.verify.reference import Reference
from admtrt.verify.report import Place, Row, Tally, sample_errors
from admtrt.verify.tolerances import AS_FAR_AS_PYTORCH, TOLERANCES, judged_by_float64

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from admtrt.models.checkpoint import LoadedNetwork
    from admtrt.runtime.slots import Array, Images, Labels


def float64_sides(
    unet: LoadedNetwork, classifier: LoadedNetwork | None, narrow: Reference
) -> list[Reference]:
    """PyTorch in float64, and twice more with the networks' outputs perturbed in opposite directions.

    Args:
        unet, classifier: the loaded networks, float32.
        narrow: the float32 reference, whose rounding sets the perturbation.
    """
    exact = Reference(unet, classifier, torch.float64)
    return [exact, *(_Moved(exact, narrow, factor) for factor in (AS_FAR_AS_PYTORCH, -AS_FAR_AS_PYTORCH))]


class _Moved(Reference):
    """Float64 with network outputs perturbed by a multiple of PyTorch's largest rounding error of the sample.

    Where x_0 is clipped, a value can depend on a few unclipped pixels and on which side of the clip they lie.
    One realisation of rounding may miss them all. Therefore every pixel is perturbed, in a fixed pattern of
    signs.
    """

    def __init__(self, exact: Reference, narrow: Reference, factor: float) -> None:
        self.__dict__.update(vars(exact))  # share the networks, which may be large
        self._exact = exact
        self._narrow = narrow
        self._factor = factor

    def unet(self, x: Images, t: NDArray[np.float32], conditions: Mapping[str, Array]) -> Images:
        """See :class:`Reference`."""
        return self._moved(*(side.unet(x, t, conditions) for side in (self._exact, self._narrow)))

    def classifier_gradient(self, x: Images, t: NDArray[np.float32], y: Labels) -> Images:
        """See :class:`Reference`."""
        return self._moved(*(side.classifier_gradient(x, t, y) for side in (self._exact, self._narrow)))

    def _moved(self, exact: Images, narrow: Images) -> Images:
        return perturbed(exact, narrow, self._factor)


def perturbed(exact: Images, narrow: Images, factor: float) -> Images:
    """Float64 outputs of a network, moved by a multiple of the sample's largest difference from float32."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], exact.shape[1:])
    moved: Images = exact + factor * np.abs(exact - narrow).max(axis=(1, 2, 3), keepdims=True) * signs
    return moved


class JudgedRow:
    """A row of steps, states or images: compared with PyTorch or, if that fails, judged by float64.

    Args:
        stage, what: stage and subject of the row.
        errors_of: the error of each sample of the first against the second, float64 [N].
    """

    def __init__(
        self,
        stage: Literal["step", "trajectory", "image"],
        what: str,
        errors_of: Callable[[Images, Images], NDArray[np.float64]] = sample_errors,
    ) -> None:
        self.tally = Tally(stage, what, TOLERANCES[stage])
        self._stage = stage
        self._errors_of = errors_of
        self._reach: float | None = None  # effect of rounding; None until float64 is computed
        self._samples, self._lost = 0, 0

    def add(
        self,
        actual: Images,
        expected: Images,
        float64: Callable[[], Sequence[Images]],
        places: Sequence[Place],
        lost: NDArray[np.bool_] | None = None,
    ) -> float:
        """Add one batch. Returns the largest error; NaN if no sample could be compared.

        Args:
            actual: the bundle's, [N, C, H, W].
            expected: PyTorch's.
            float64: returns the results of :func:`float64_sides`, in order.
            places: places of the samples.
            lost: bool [N], samples to leave out; extended here by those that rounding alone changes by more
                than the tolerance. A gradient through a clip or a kink of the loss jumps there, and chance
                decides to which side. None for samples that no guide leads: they are judged by float64.
        """
        errors, given = (
            self._errors_of(actual, expected),
            np.zeros(len(actual), bool) if lost is None else lost,
        )
        if (errors > TOLERANCES[self._stage])[~given].any():
            exact, *moved = float64()
            reach = np.max([self._errors_of(other, exact) for other in moved], axis=0)
            if lost is not None:
                lost |= ~(reach <= TOLERANCES[self._stage])
            if not given.all():
                self._reach = max(self._reach or 0.0, float(reach[~given].max()))
                self.tally.judge_by(judged_by_float64(self._stage, self._reach))
            errors = self._errors_of(actual, exact)
        kept = np.flatnonzero(~given)
        self._samples, self._lost = self._samples + len(given), self._lost + int(given.sum())
        self.tally.add(errors[kept], [places[index] for index in kept.tolist()])
        return float(errors[kept].max()) if len(kept) else float("nan")

    def row(self) -> Row:
        """The resulting row."""
        if self._lost == self._samples > 0:
            self.tally.fail(
                "compare",
                "every sample met a jump of its gradient; compare others, with another --seed",
            )
        row = self.tally.row()
        if self._lost and row.status == "pass":
            row = replace(
                row, detail=f"{self._lost} of {self._samples} samples left out: their gradient jumps"
            )
        return row if self._reach is None else replace(row, what=f"{row.what}, against float64")
