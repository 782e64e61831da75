"""The Fréchet distance between Gaussians fitted to features: FID, sFID and FD, in float64 throughout.

    d = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)                     (Heusel et al. 2017, eq. 6)

A covariance S is kept as a root F with F'F = S. Then tr (S1 S2)^(1/2) is the sum of the singular values of F1
F2', which is always real, exact with fewer images than features, and needs no regularisation of the diagonal.
Values are never computed from x x', which would square the condition number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from admtrt.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Features = NDArray[np.float32]
Matrix = NDArray[np.float64]

_BLOCK = 4096
"""Rows per factorisation. Fixed, so that sums do not depend on batches or on how images are read."""
_HALVES = 20
_SIZES = 12  # number of subset sizes for the fit in 1/N
_SMALLEST_SUBSET = 0.2  # fraction of the samples
_NEGATIVE = 1e-3  # relative to the largest eigenvalue: rounding explains no more


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance of features.

    Attributes:
        mean: float64 [D].
        root: float64 [r, D] with root' root = the covariance; r is D, or less with few images.
        count: number of images; None if only the statistics are known.
    """

    mean: Matrix
    root: Matrix
    count: int | None

    @classmethod
    def fit(cls, features: Iterable[Features], name: str = "the set") -> Self:
        """Fit mean and unbiased covariance (N - 1) to features given in parts, each [n, D].

        Blocks are merged by the QR of ``[R1; X2 - m2; sqrt(n1 n2 / (n1 + n2)) (m1 - m2)]``.

        Raises:
            DataError: if there are fewer than two images.
        """
        mean, root, count = np.zeros(0), np.zeros((0, 0)), 0
        for block in _blocks(features):
            x = block.astype(np.float64)
            own = x.mean(axis=0)
            x -= own
            if not count:
                mean, parts = own, [x]
            else:
                shift = own - mean
                parts = [root, x, math.sqrt(count * len(x) / (count + len(x))) * shift[None]]
                mean = mean + shift * (len(x) / (count + len(x)))
            root = np.asarray(np.linalg.qr(np.concatenate(parts), mode="r"))
            count += len(x)
        if count < 2:
            raise DataError(
                f"{name} has {'one image' if count else 'no image'}; a covariance needs two or more",
                hint="Give more images.",
            )
        return cls(mean, root / math.sqrt(count - 1), count)

    @classmethod
    def from_statistics(cls, mean: NDArray[Any], covariance: NDArray[Any], name: str) -> Self:
        """Use stored statistics, [D] and [D, D]; eigenvalues that rounding made negative are set to 0.

        Raises:
            DataError: if they are not a mean and a covariance; ``name`` is for the message.
        """
        if mean.ndim != 1 or not mean.size or covariance.shape != (mean.size, mean.size):
            raise DataError(
                f"{name}: a mean of shape {list(mean.shape)} and a covariance of shape "
                f"{list(covariance.shape)}; expected [D] and [D, D]"
            )
        if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
            raise DataError(
                f"{name}: {mean.dtype} and {covariance.dtype}; expected floating-point statistics"
            )
        m, s = mean.astype(np.float64), covariance.astype(np.float64)
        if not (np.isfinite(m).all() and np.isfinite(s).all()):
            raise DataError(f"{name}: the statistics hold NaN or infinity")
        largest = float(np.abs(s).max())
        if np.abs(s - s.T).max() > _NEGATIVE * largest:
            raise DataError(f"{name}: the covariance is not symmetric")
        values, vectors = np.linalg.eigh(s / 2 + s.T / 2)
        if not (np.isfinite(values).all() and np.isfinite(vectors).all()):
            raise DataError(f"{name}: the covariance is too large for float64")
        if values[0] < -_NEGATIVE * max(values[-1], 0.0):
            raise DataError(
                f"{name}: the covariance has the eigenvalue {values[0]:.3g}; expected none below 0 "
                f"(the largest is {values[-1]:.3g})"
            )
        return cls(m, np.sqrt(np.maximum(values, 0))[:, None] * vectors.T, None)

    @property
    def covariance(self) -> Matrix:
        """float64 [D, D]."""
        covariance: Matrix = self.root.T @ self.root
        return covariance


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Fréchet distance; never below 0, infinite where float64 overflows."""
    product = a.root @ b.root.T
    if not np.isfinite(product).all():
        return math.inf
    fidelity = np.linalg.svd(product, compute_uv=False).sum()
    return _distance(a.mean, float((a.root**2).sum()), b, float(fidelity))


def half_sample_error(features: Features, reference: Gaussian, seed: int) -> float | None:
    """Standard error of the distance of features [N, D]: its deviation over random halves.

    The halves are drawn without replacement, since duplicates would bias the distance. The delete-half
    jackknife needs no correction factor. None below four images.
    """
    count = len(features)
    if count < 4:
        return None
    rng = np.random.default_rng(seed)
    halves = (rng.permutation(count)[: count // 2] for _ in range(_HALVES))
    values = _subset_distances(features, halves, reference)
    return float(np.std(values, ddof=1))


def infinite_distance(features: Features, reference: Gaussian, seed: int) -> tuple[float, float] | None:
    """Distance at infinite N and its standard error: a fit in 1/N over subsets (Chong & Forsyth 2020).

    Subsets of a fifth of the samples up to all are drawn without replacement. None below 20 images.
    """
    count = len(features)
    if count < 20:
        return None
    rng = np.random.default_rng(seed)
    sizes = np.linspace(_SMALLEST_SUBSET * count, count, _SIZES).round().astype(int)
    values = _subset_distances(features, (rng.permutation(count)[:size] for size in sizes), reference)
    x = 1 / sizes
    x_centred = x - x.mean()
    slope = float(x_centred @ values / (x_centred @ x_centred))
    value = float(values.mean() - slope * x.mean())
    residual = values - value - slope * x
    variance = float(residual @ residual) / (_SIZES - 2)
    return value, math.sqrt(variance * (1 / _SIZES + x.mean() ** 2 / float(x_centred @ x_centred)))


def _subset_distances(
    features: Features, subsets: Iterable[NDArray[np.int64]], reference: Gaussian
) -> Matrix:
    """Distances of subsets of the features, with half the digits: by products instead of factorisations.

    The singular values of X R' are the roots of the eigenvalues of (X R')(X R')', on its smaller side. The
    loss, 1e-8 of the trace, is far below the deviations that these distances are used for.
    """
    return np.array([_subset_distance(features, np.sort(rows), reference) for rows in subsets])


def _subset_distance(features: Features, rows: NDArray[np.int64], reference: Gaussian) -> float:
    mean = features[rows[:_BLOCK]].astype(np.float64).mean(axis=0)  # an approximate mean suffices to centre
    d, n = features.shape[1], len(rows)
    total, squares = np.zeros(d), 0.0
    gram = np.zeros((d, d)) if n > d else None
    for first in range(0, n, _BLOCK):
        x = features[rows[first : first + _BLOCK]] - mean
        total += x.sum(axis=0)
        squares += float((x * x).sum())
        if gram is not None:
            gram += x.T @ x
    shift = total / n
    trace = (squares - n * float(shift @ shift)) / (n - 1)
    if gram is not None:
        covariance = (gram - n * np.outer(shift, shift)) / (n - 1)
        product = reference.root @ covariance @ reference.root.T
    else:  # fewer images than features: one or two blocks
        x = (features[rows] - (mean + shift)) / math.sqrt(n - 1)
        y = x @ reference.root.T
        product = y @ y.T
    fidelity = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)).sum()
    return _distance(mean + shift, trace, reference, float(fidelity))


def _distance(mean: Matrix, trace: float, other: Gaussian, fidelity: float) -> float:
    difference = mean - other.mean
    total = float(difference @ difference) + trace + float((other.root**2).sum()) - 2 * fidelity
    return max(total, 0.0) if math.isfinite(total) else total


def _blocks(parts: Iterable[Features]) -> Iterator[Features]:
    """Regroup rows into blocks of a fixed size."""
    waiting: list[Features] = []
    held = 0
    for part in parts:
        waiting.append(part)
        held += len(part)
        if held < _BLOCK:
            continue
        joined = np.concatenate(waiting)
        whole = held - held % _BLOCK
        for first in range(0, whole, _BLOCK):
            yield joined[first : first + _BLOCK]
        waiting, held = [joined[whole:]], held - whole
    if held:
        yield np.concatenate(waiting)
