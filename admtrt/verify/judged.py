"""Judge by float64 where rounding is amplified: no float32 side is right there."""

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
    """PyTorch in float64, then the same with its networks' outputs moved one way and the other.

    Args:
        unet, classifier: the loaded networks, float32.
        narrow: they in float32, whose rounding is the measure.
    """
    exact = Reference(unet, classifier, torch.float64)
    return [exact, *(_Moved(exact, narrow, factor) for factor in (AS_FAR_AS_PYTORCH, -AS_FAR_AS_PYTORCH))]


class _Moved(Reference):
    """Float64 whose networks' outputs are moved by a multiple of PyTorch's largest rounding of the sample.

    A value hangs on few pixels where the clipping of x_0 leaves few, and on which side of the clip they lie:
    one draw of rounding may spare them all. Here every pixel is moved, in a fixed pattern of signs.
    """

    def __init__(self, exact: Reference, narrow: Reference, factor: float) -> None:
        self.__dict__.update(vars(exact))  # the same networks, which may be large
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
        signs = np.random.default_rng(0).choice([-1.0, 1.0], exact.shape[1:])
        moved: Images = (
            exact + self._factor * np.abs(exact - narrow).max(axis=(1, 2, 3), keepdims=True) * signs
        )
        return moved


class JudgedRow:
    """A row of steps, states or images: against PyTorch, or by float64 where that is beyond the bar.

    Args:
        stage, what: of the row.
        errors_of: how far each sample of the first is from the second, float64 [N].
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
        self._reach: float | None = None  # of rounding; None as long as float64 was not asked

    def add(
        self,
        actual: Images,
        expected: Images,
        float64: Callable[[], Sequence[Images]],
        places: Sequence[Place],
    ) -> float:
        """Take one batch; the largest error.

        Args:
            actual: the bundle's, [N, C, H, W].
            expected: PyTorch's.
            float64: gives what :func:`float64_sides` say, in their order.
            places: of the samples.
        """
        errors = self._errors_of(actual, expected)
        if (errors > TOLERANCES[self._stage]).any():
            exact, *moved = float64()
            reach = max(float(self._errors_of(other, exact).max()) for other in moved)
            self._reach = max(self._reach or 0.0, reach)
            self.tally.judge_by(judged_by_float64(self._stage, self._reach))
            errors = self._errors_of(actual, exact)
        self.tally.add(errors, places)
        return float(errors.max())

    def row(self) -> Row:
        """The outcome."""
        row = self.tally.row()
        return row if self._reach is None else replace(row, what=f"{row.what}, against float64")
