"""Features of a set of images, stored block by block so that none is computed twice.

A block is identified by its images' bytes, the network, the library and the precision. It can therefore be
reused after a kill, while a run is still drawing, and when the images move.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from admtrt.errors import DataError, OutputError
from admtrt.evaluate.images import blocks, chosen_rows
from admtrt.evaluate.network import POOL
from admtrt.files import atomic_file
from admtrt.memo import cache_folder
from admtrt.npz import NpzFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from admtrt.evaluate.extract import Extractor
    from admtrt.evaluate.frechet import Features
    from admtrt.evaluate.images import ImageSource, Pixels

BLOCK = 256
"""Images per file: the most work that a kill loses."""
_FOLDER = "features"


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features of N images.

    Attributes:
        outputs: names of the available outputs.
        hashes: uint64 [N], a hash of each image (of each row, if only features are given).
        digest: SHA-256 of all images, in order.
    """

    outputs: tuple[str, ...]
    hashes: NDArray[np.uint64]
    digest: str
    _files: tuple[Path, ...]
    _given: dict[str, Features]

    def __len__(self) -> int:
        return len(self.hashes)

    def parts(self, output: str) -> Iterator[Features]:
        """Yield one output in parts, float32 [n, D]."""
        if output in self._given:
            yield self._given[output]
        for file in self._files:
            yield NpzFile.open(file)[output].read()

    def subset(self, rows: NDArray[np.int64]) -> FeatureSet:
        """Some rows of all outputs, in memory; the indices are ascending."""
        if len(rows) == len(self):
            return self
        given = {output: self.matrix(output)[rows] for output in self.outputs}
        hashes = self.hashes[rows]
        return FeatureSet(self.outputs, hashes, _digest(hashes), (), given)

    def matrix(self, output: str) -> Features:
        """One output, float32 [N, D]."""
        if output in self._given:
            return self._given[output]
        return _joined(self.parts(output), len(self))


def _joined(parts: Iterable[Features], rows: int) -> Features:
    """Join parts into one array of ``rows`` rows without a second copy."""
    whole, first = None, 0
    for part in parts:
        if whole is None:
            whole = np.empty((rows, *part.shape[1:]), part.dtype)
        whole[first : first + len(part)] = part
        first += len(part)
    assert whole is not None
    assert first == rows
    return whole


def given_features(path: Path, archive: NpzFile, count: int | None = None, seed: int = 0) -> FeatureSet:
    """Read features from an .npz file: ``pool`` [N, D], and optionally ``spatial`` and ``logits``.

    Raises:
        DataError: if they are not features, or contain NaN or infinity.
    """
    arrays = {}
    for name in (POOL, "spatial", "logits"):
        if name not in archive:
            continue
        member = archive[name]
        if member.dtype.kind != "f" or len(member.shape) != 2 or not all(member.shape):
            raise DataError(f"{path}: {name} is {member.dtype} {list(member.shape)}; expected floats [N, D]")
        with np.errstate(over="ignore"):  # overflow becomes infinity, which is refused
            arrays[name] = member.read().astype(np.float32, copy=False)
        _check_finite(arrays[name], name, str(path), 0)
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"{path}: rows differ: {counts}", hint="Every output has one row for each image.")
    if count is not None:
        rows = chosen_rows(len(arrays[POOL]), count, seed)
        arrays = {name: array[rows] for name, array in arrays.items()}
    hashes = row_hashes(np.ascontiguousarray(arrays[POOL]).view(np.uint8).reshape(len(arrays[POOL]), -1))
    return FeatureSet(tuple(arrays), hashes, _digest(hashes), (), arrays)


def extract(
    source: ImageSource,
    extractor: Extractor,
    name: str,
    *,
    batch_size: int,
    progress: Callable[[int, str], None] = lambda _count, _text: None,
    each_block: Callable[[Pixels], None] = lambda _: None,
) -> FeatureSet:
    """Features of every image, loaded if stored, else computed.

    Args:
        source: the images.
        extractor: the network.
        name: name of the images, for messages.
        batch_size: images computed at once.
        progress: called with the images done.
        each_block: called with each block of images as it is read.

    Raises:
        DataError: naming the first image whose features are NaN or infinite.
        UserError: from reading and computing.
    """
    folder = block_folder(source.run, extractor)
    files, hashes, first = [], [], 0
    for images in blocks(source, BLOCK):
        each_block(images)
        file, own = keep_block(folder, images, extractor, name, first, batch_size)
        hashes.append(own)
        files.append(file)
        first += len(images)
        progress(len(images), name)
    every = np.concatenate(hashes)
    return FeatureSet(extractor.outputs, every, _digest(every, source.shape), tuple(files), {})


def keep_block(
    folder: Path, images: Pixels, extractor: Extractor, name: str, first: int, batch_size: int
) -> tuple[Path, NDArray[np.uint64]]:
    """Return the file of a block's features, computed if missing, and the hashes of its images.

    Args:
        folder: of :func:`block_folder`.
        images: the block's images.
        extractor: the network.
        name: of the set, for messages.
        first: index of the block's first image in the set.
        batch_size: images computed at once.

    Raises:
        DataError: naming the first image whose features are NaN or infinite.
    """
    own = row_hashes(images.reshape(len(images), -1))
    file = folder / f"{_digest(own, images.shape[1:])}.npz"
    if not _is_whole(file, extractor.outputs, len(images)):
        made = _computed(images, extractor, name, first, batch_size)
        with atomic_file(file) as temporary, temporary.open("wb") as opened:
            np.savez(opened, **made)  # type: ignore[arg-type]
    return file, own


def _computed(
    images: Pixels, extractor: Extractor, name: str, first: int, batch_size: int
) -> dict[str, Features]:
    parts = [extractor(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
    made = {output: np.concatenate([part[output] for part in parts]) for output in extractor.outputs}
    for output, values in made.items():
        _check_finite(values, output, name, first)
    return made


def _check_finite(values: Features, output: str, name: str, first: int) -> None:
    wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(wrong):
        raise DataError(
            f"{name}: '{output}' of image {first + int(wrong[0])} is NaN or infinite "
            f"({len(wrong)} image{'s' * (len(wrong) > 1)} of the block or file)",
            hint="The features' network or the file is at fault; nothing can be compared with such numbers.",
        )


def block_folder(run: Path | None, extractor: Extractor) -> Path:
    """The folder of blocks: in the images' run, else in the user's cache, else temporary."""
    parts = (extractor.network.digest, extractor.backend, extractor.precision, extractor.resize)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    homes = [home for home in (run, cache_folder()) if home is not None]
    for home in homes:
        folder = home / _FOLDER / key
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    global _own
    if _own is None:
        try:
            _own = tempfile.TemporaryDirectory(prefix="admtrt-features-")
        except OSError as error:
            raise OutputError(f"there is no place for features: {error.strerror or error}") from None
    folder = Path(_own.name, key)
    folder.mkdir(exist_ok=True)
    return folder


_own: tempfile.TemporaryDirectory[str] | None = None


def _is_whole(file: Path, outputs: tuple[str, ...], count: int) -> bool:
    """True if a block is stored with all requested outputs."""
    if not file.exists():
        return False
    try:
        archive = NpzFile.open(file)
    except DataError:
        return False
    return all(
        name in archive and archive[name].dtype == np.float32 and archive[name].shape[:1] == (count,)
        for name in outputs
    )


def row_hashes(rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """A 64-bit BLAKE2 hash of each row of uint8 [N, values]."""
    digests = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, "<u8")


def _digest(hashes: NDArray[np.uint64], shape: tuple[int, ...] = ()) -> str:
    return hashlib.sha256(hashes.tobytes() + repr(tuple(map(int, shape))).encode()).hexdigest()
