"""Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020), exactly.

Squared distances come from float32 products of centred features, block by block. Where rounding could decide,
close to a radius, the distance is recomputed from differences in float64. The counts are therefore exact, and
equal images have distance 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Features = NDArray[np.float32]
Matrix = NDArray[np.float64]
_Rows = slice | NDArray[np.int64]

NEIGHBOURS = 3
"""k of precision and recall in the paper and the ADM evaluator."""
DENSITY_NEIGHBOURS = 5
"""k of density and coverage in their paper."""
_BLOCK = 2048  # rows and columns of one product
_SPARE = 4  # additional neighbours whose distances are computed exactly
_MANY = 1 / 256  # fraction of undecided distances of a block from which to use float64 products
_OPEN_ROWS = 256  # rows computed at once in float64
_EXACT_VALUES = 2**23  # values per computation by differences: 64 MiB


@dataclass(frozen=True)
class Manifold:
    """Fractions of samples (precision) and of reference images (recall, coverage); density, a mean of counts.

    None if either set has no more images than neighbours.

    Attributes:
        density_error: standard error of ``density`` over the samples.
    """

    precision: float | None
    recall: float | None
    density: float | None
    coverage: float | None
    density_error: float | None


def manifold_metrics(
    reference: Features,
    samples: Features,
    k: int = NEIGHBOURS,
    density_k: int = DENSITY_NEIGHBOURS,
    known: dict[int, Matrix] | None = None,
) -> Manifold:
    """Compare samples [N, D] with a reference [M, D], both finite.

    Args:
        reference: float32.
        samples: float32.
        k: number of neighbours, without the image itself, that define the radius of precision and recall; a
            distance equal to the radius is inside.
        density_k: the same for density and coverage.
        known: the reference's :func:`radii` by number of neighbours, for the next call with the same
            reference; missing ones are added. They cost the square of its number of images.
    """
    known = {} if known is None else known
    fewest = min(len(reference), len(samples))
    if fewest <= min(k, density_k):
        return Manifold(None, None, None, None, None)
    ks = [one for one in (k, density_k) if fewest > one]
    if missing := [one for one in ks if one not in known]:
        known.update(zip(missing, radii(reference, missing), strict=True))
    wide = {one: known[one] for one in ks}
    (own,) = radii(samples, [k]) if k in wide else (None,)
    inside = np.zeros(len(samples), bool)  # the sample lies in some reference image's ball
    held = np.zeros(len(reference), bool)  # the reference image lies in some sample's ball
    covered = np.zeros(len(reference), bool)  # some sample lies in the reference image's ball
    counts = np.zeros(len(samples), np.int64)
    for r, c, block in _Distances(reference, samples).blocks():
        if own is not None:
            inside[c] |= block.within(wide[k][r, None]).any(axis=0)
            held[r] |= block.within(own[None, c]).any(axis=1)
        if density_k in wide:
            dense = block.within(wide[density_k][r, None])
            covered[r] |= dense.any(axis=1)
            counts[c] += dense.sum(axis=0)
    densities = counts / density_k
    dense_enough = density_k in wide
    return Manifold(
        precision=float(inside.mean()) if own is not None else None,
        recall=float(held.mean()) if own is not None else None,
        density=float(densities.mean()) if dense_enough else None,
        coverage=float(covered.mean()) if dense_enough else None,
        density_error=float(densities.std(ddof=1)) / math.sqrt(len(densities)) if dense_enough else None,
    )


def radii(features: Features, ks: Sequence[int]) -> Matrix:
    """Squared distance from each of N > max(ks) images to its k-th nearest other one: [len(ks), N]."""
    found = np.empty((len(ks), len(features)))
    for rows, values, _ in _Distances(features, features).nearest(max(ks) + 1):
        found[:, rows] = values[:, list(ks)].T  # index 0 is the image itself
    return found


def nearest_images(samples: Features, training: Features) -> tuple[Matrix, NDArray[np.int64]]:
    """Distance (not squared) from each sample to its nearest training image, and its index: both [N]."""
    distances, indices = np.empty(len(samples)), np.empty(len(samples), np.int64)
    for rows, values, columns in _Distances(samples, training).nearest(1):
        distances[rows], indices[rows] = np.sqrt(values[:, 0]), columns[:, 0]
    return distances, indices


class _Distances:
    """Squared distances between the rows of two matrices: fast within a bound, or exact.

    Both are centred on the same mean and scaled by a power of two, so that float32 neither loses digits to an
    offset nor overflows.
    """

    def __init__(self, a: Features, b: Features) -> None:
        self._a, self._b = a, b
        self._centre = a.mean(axis=0, dtype=np.float64)
        largest = max(self._largest(a), self._largest(b))
        self.scale = 2.0 ** -math.frexp(largest)[1] if largest else 1.0
        self._x, self._xx = self._prepared(a)
        self._y, self._yy = (self._x, self._xx) if b is a else self._prepared(b)

    def blocks(self) -> Iterator[tuple[slice, slice, _Block]]:
        """Yield every block of the matrix, with its rows and columns."""
        for i in range(0, len(self._a), _BLOCK):
            rows = slice(i, min(i + _BLOCK, len(self._a)))
            for j in range(0, len(self._b), _BLOCK):
                columns = slice(j, min(j + _BLOCK, len(self._b)))
                yield rows, columns, _Block(self, rows, columns)

    def approximate(
        self, rows: _Rows, columns: slice, dtype: type[np.floating[Any]] = np.float32
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Scaled squared distances from products in a dtype, and bounds of their errors; both [n, m]."""
        xx, yy = self._xx[rows, None].astype(dtype), self._yy[None, columns].astype(dtype)
        if dtype is np.float32:
            x, y = self._x[rows], self._y[columns]
        else:
            x = (self._a[rows] - self._centre) * self.scale
            y = (self._b[columns] - self._centre) * self.scale
        values = x @ y.T
        values *= -2
        values += xx
        values += yy
        # Errors of a product of D terms (Higham 2002, section 3.1), of centring and of the sums of squares.
        unit = (self._a.shape[1] + 8) * np.finfo(dtype).eps
        return values, unit * xx + unit * yy

    def exact(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Matrix:
        """Unscaled squared distances of pairs, by differences in float64."""
        found = np.empty(len(rows))
        step = max(1, _EXACT_VALUES // self._a.shape[1])
        for first in range(0, len(rows), step):
            pairs = slice(first, first + step)
            difference = self._a[rows[pairs]].astype(np.float64) - self._b[columns[pairs]]
            found[pairs] = (difference**2).sum(axis=1)
        return found

    def nearest(self, count: int) -> Iterator[tuple[NDArray[np.int64], Matrix, NDArray[np.int64]]]:
        """The ``count`` smallest exact squared distances of every row, ascending, and their columns.

        Yields:
            rows: consecutive ones, [n].
            distances, columns: [n, count].
        """
        for first in range(0, len(self._a), _BLOCK):
            rows = np.arange(first, min(first + _BLOCK, len(self._a)))
            columns, bound = self._candidates(slice(first, first + len(rows)), count + _SPARE)
            values = self.exact(np.repeat(rows, columns.shape[1]), columns.ravel()).reshape(columns.shape)
            order = np.lexsort((columns, values))[:, :count]
            values = np.take_along_axis(values, order, axis=1)
            columns = np.take_along_axis(columns, order, axis=1)
            # Distances are at least 0; all but the candidates are at least `bound`.
            open_rows = np.flatnonzero(values[:, -1] > np.maximum(bound, 0))
            for part in np.array_split(open_rows, -(-len(open_rows) // _OPEN_ROWS)) if len(open_rows) else ():
                values[part], columns[part] = self._settled(rows[part], values[part, -1], count)
            yield rows, values, columns

    def _candidates(self, rows: slice, count: int) -> tuple[NDArray[np.int64], Matrix]:
        """Candidate columns with small distances, [n, up to count], and a lower bound for all others, [n]."""
        size = rows.stop - rows.start
        values, columns = np.empty((size, 0), np.float32), np.empty((size, 0), np.int64)
        bound = np.full(size, np.inf)
        for first in range(0, len(self._b), _BLOCK):
            block, error = self.approximate(rows, slice(first, first + _BLOCK))
            block -= error  # lower bounds
            values = np.concatenate([values, block], axis=1)
            numbers = np.arange(first, first + block.shape[1])
            columns = np.concatenate([columns, np.broadcast_to(numbers, block.shape)], axis=1)
            if values.shape[1] > count:
                order = np.argpartition(values, count, axis=1)
                bound = np.minimum(bound, np.take_along_axis(values, order[:, count:][:, :1], axis=1)[:, 0])
                values = np.take_along_axis(values, order[:, :count], axis=1)
                columns = np.take_along_axis(columns, order[:, :count], axis=1)
        return columns, bound / self.scale**2

    def _settled(
        self, rows: NDArray[np.int64], upper: Matrix, count: int
    ) -> tuple[Matrix, NDArray[np.int64]]:
        """The same for rows whose candidates are too close together for float32.

        ``upper`` [n] is an upper bound for the distances sought.
        """
        values, error = self.approximate(rows, slice(None), np.float64)
        limit = upper * self.scale**2
        near, found = np.nonzero(values - error <= (limit * (1 + 1e-12))[:, None])
        exact = self.exact(rows[near], found)
        order = np.lexsort((found, exact, near))
        starts = np.searchsorted(near, np.arange(len(rows)))
        chosen = order[starts[:, None] + np.arange(count)]
        return exact[chosen], found[chosen]

    def _prepared(self, features: Features) -> tuple[Features, Matrix]:
        """Centre and scale to float32; also the sums of squares in float64."""
        centred, squares = np.empty(features.shape, np.float32), np.empty(len(features))
        for first in range(0, len(features), _BLOCK):
            part = (features[first : first + _BLOCK] - self._centre) * self.scale
            centred[first : first + _BLOCK] = part
            squares[first : first + _BLOCK] = np.einsum("nd,nd->n", part, part)
        return centred, squares

    def _largest(self, features: Features) -> float:
        return max(
            float(np.abs(features[first : first + _BLOCK] - self._centre).max())
            for first in range(0, len(features), _BLOCK)
        )


class _Block:
    """One block of distances, to be compared with radii."""

    def __init__(self, distances: _Distances, rows: slice, columns: slice) -> None:
        self._distances, self._rows, self._columns = distances, rows, columns
        self._values, self._error = distances.approximate(rows, columns)

    def within(self, radius: Matrix) -> NDArray[np.bool_]:
        """Mask of distances within a radius, given squared and broadcastable to the block."""
        inside, unsure = self._compared(radius)
        if self._values.dtype == np.float32 and np.count_nonzero(unsure) > inside.size * _MANY:
            self._values, self._error = self._distances.approximate(self._rows, self._columns, np.float64)
            inside, unsure = self._compared(radius)
        rows, columns = np.nonzero(unsure)
        if len(rows):
            exact = self._distances.exact(rows + self._rows.start, columns + self._columns.start)
            inside[rows, columns] = exact <= np.broadcast_to(radius, inside.shape)[rows, columns]
        return inside

    def _compared(self, radius: Matrix) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Masks of distances within the radius, and of those that rounding could decide."""
        dtype = self._values.dtype
        scaled = (radius * self._distances.scale**2).astype(dtype)
        gap = self._values - scaled
        inside = gap <= 0
        np.abs(gap, out=gap)
        gap -= self._error
        return inside, gap <= 8 * np.finfo(dtype).eps * scaled  # the radius is rounded, too
