"""Separable linear operators on images, as matrices of rows and columns, for the guide ``linear``.

An operator A maps each channel x to R x C'. If the result is smaller than the image, R and C are padded with
rows of zeros, and the measurement with zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from admtrt.errors import RequestError
from admtrt.runtime.low_pass import bicubic_matrix

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Float64 = NDArray[np.float64]

_FORMS = "identity, sr:N, pool:N or blur:SIGMA[:SIZE]"
_HINT = "Write e.g. sr:4 (bicubic reduction), pool:2 (means of 2x2 pixels) or blur:1.5:9."


class Operator:
    """A linear operator, parsed from its text.

    Args:
        text: ``identity``; ``sr:N`` reduces by N with MATLAB's bicubic kernel, ``pool:N`` by means;
            ``blur:S[:SIZE]`` is a Gaussian of standard deviation S pixels over SIZE of them (4 S either way
            where left out; what a smaller one cuts off is folded back), borders mirrored without repeating
            the edge. Several after one another are joined by commas.
        event: (C, H, W) of the images.

    Attributes:
        rows, columns: float64 [h, H] and [w, W].

    Raises:
        RequestError: for an unknown form or a number out of range.
    """

    def __init__(self, text: str, event: tuple[int, ...]) -> None:
        self.text = text
        self._event = event
        self.rows, self.columns = (_matrix(text, size) for size in event[1:])

    @property
    def result(self) -> tuple[int, int]:
        """(h, w) of the result."""
        return len(self.rows), len(self.columns)

    def targets(self) -> dict[str, NDArray[np.float32]]:
        """``rows`` and ``columns`` as the graph takes them, float32 [1, H, H] and [1, W, W]."""
        named = {"rows": self.rows, "columns": self.columns}
        return {name: _filled(one, one.shape[1])[None].astype(np.float32) for name, one in named.items()}

    def applied(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """The operator applied to images: float32 [N, C, h, w]."""
        return np.ascontiguousarray(self.rows @ images.astype(np.float64) @ self.columns.T, np.float32)

    def filled(self, measurement: NDArray[np.float32]) -> NDArray[np.float32]:
        """Pad a measurement [N, C, h, w] with zeros to the size of the image."""
        full = np.zeros((*measurement.shape[:2], *self._event[1:]), np.float32)
        full[:, :, : measurement.shape[2], : measurement.shape[3]] = measurement
        return full


def _matrix(text: str, size: int) -> Float64:
    matrix = np.eye(size)
    for part in text.split(","):
        name, *numbers = part.strip().split(":")
        if name not in _MAKERS or not _plain(numbers):
            raise RequestError(f"operator {text[:60]!r} is unknown; expected {_FORMS}", hint=_HINT)
        matrix = _MAKERS[name](len(matrix), [float(number) for number in numbers], part) @ matrix
    return matrix


def _plain(numbers: list[str]) -> bool:
    try:
        return all(0 < float(number) < 1e6 for number in numbers)
    except ValueError:
        return False


def _identity(size: int, numbers: list[float], text: str) -> Float64:
    _expect(not numbers, text)
    return np.eye(size)


def _reduced(size: int, numbers: list[float], text: str) -> Float64:
    return bicubic_matrix(size, size // _factor(size, numbers, text))


def _pooled(size: int, numbers: list[float], text: str) -> Float64:
    factor = _factor(size, numbers, text)
    return np.kron(np.eye(size // factor), np.full((1, factor), 1 / factor))


def _blurred(size: int, numbers: list[float], text: str) -> Float64:
    _expect(len(numbers) in (1, 2), text)
    sigma = numbers[0]
    width = int(numbers[1]) if len(numbers) > 1 else 2 * int(np.ceil(4 * sigma)) + 1
    if (len(numbers) > 1 and numbers[1] != width) or width % 2 == 0 or width // 2 >= size:
        raise RequestError(
            f"operator {text!r}: {width} places do not fit; expected an odd number below {2 * size}",
            hint=_HINT,
        )
    # As in DPS (SciPy's gaussian_filter of an impulse): 4 sigma to either side, folded into the width.
    if sigma > size:  # bounds the kernel's length, which grows with sigma
        raise RequestError(f"operator {text!r}: a blur of {sigma:g} pixels is wider than {size}", hint=_HINT)
    reach = int(4 * sigma + 0.5)
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    folded = np.arange(-reach, reach + 1) + width // 2
    folded = np.where(folded % (2 * width) < width, folded % width, width - 1 - folded % width)
    kernel = np.zeros(width)
    np.add.at(kernel, folded, weights / weights.sum())
    offsets = np.arange(width) - width // 2
    places = np.abs(np.arange(size)[:, None] + offsets)
    places = np.where(places >= size, 2 * (size - 1) - places, places)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], places), kernel)
    return matrix


def _factor(size: int, numbers: list[float], text: str) -> int:
    _expect(len(numbers) == 1, text)
    factor = int(numbers[0])
    if factor != numbers[0] or factor < 2 or size % factor:
        raise RequestError(
            f"operator {text!r} reduces {size} pixels by {numbers[0]:g}; expected a divisor, 2 or more",
            hint=_HINT,
        )
    return factor


def _expect(fits: bool, text: str) -> None:
    if not fits:
        raise RequestError(f"operator {text[:60]!r} is unknown; expected {_FORMS}", hint=_HINT)


def _filled(matrix: Float64, size: int) -> Float64:
    full = np.zeros((size, size))
    full[: len(matrix)] = matrix
    return full


_MAKERS: dict[str, Callable[[int, list[float], str], Float64]] = {
    "identity": _identity,
    "sr": _reduced,
    "pool": _pooled,
    "blur": _blurred,
}
