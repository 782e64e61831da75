"""The shards of a run: files of images, written atomically and checked when read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.errors import OutputError
from admtrt.files import atomic_file, remove_stale
from admtrt.npz import Header, open_npz, reading_fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from admtrt.bundle import Manifest
    from admtrt.npz import Archive
    from admtrt.runtime.bulk import BulkRequest

SHARDS = "shards"
"""Name of the folder of shards in a run directory."""
_AGAIN = "Delete it and repeat the command: it alone is drawn again."


class Shards:
    """The images of a run as one array, read shard by shard. The shards may be written later.

    Args:
        directory: the run directory.
        request: what the run draws.
        manifest: of the bundle, which gives the shape of an image.

    Attributes:
        image_shape: (H, W, C) of an image.
    """

    def __init__(self, directory: Path, request: BulkRequest, manifest: Manifest) -> None:
        self._folder = directory / SHARDS
        self._request = request
        size = manifest.network.image_size
        self.image_shape = (size, size, manifest.network.in_channels)

    def __len__(self) -> int:
        return self._request.count

    def __getitem__(self, rows: slice, /) -> NDArray[np.uint8]:
        """Read these rows, uint8 [n, H, W, C].

        Raises:
            OutputError: if a shard is missing, damaged or not of this request.
        """
        size = self._request.shard_size
        start, stop, _ = rows.indices(len(self))
        return np.concatenate(
            [
                self._read(first)[max(0, start - first) : stop - first]
                for first in range(start - start % size, stop, size)
            ]
        )

    def images(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the images of each shard in order.

        Raises:
            OutputError: as above.
        """
        return (self._read(start) for start, _ in self._parts())

    @property
    def finished(self) -> int:
        """Number of samples in the existing shards."""
        return sum(stop - start for start, stop in self._parts() if self.holds(start))

    def missing(self) -> Iterator[tuple[int, int]]:
        """The range (start, stop) of each missing shard. Existing shards are checked.

        Raises:
            OutputError: if an existing shard is damaged or not of this request.
        """
        remove_stale(self._folder)
        for start, stop in self._parts():
            if self.holds(start):
                self._check(start)
            else:
                yield start, stop

    def holds(self, start: int) -> bool:
        """True if the shard that begins with this sample exists."""
        return self._path(start).exists()

    def write(self, start: int, images: NDArray[np.uint8]) -> None:
        """Write one shard.

        Args:
            start: its first sample.
            images: uint8 [n, H, W, C].

        Raises:
            OutputError: if it cannot be written.
        """
        arrays: dict[str, Any] = {"images": images}
        if self._request.labels is not None:
            arrays["labels"] = self._request.labels[start : start + len(images)]
        with (
            atomic_file(self._path(start), sweep=False) as temporary,
            temporary.open("wb") as opened,
        ):
            np.savez(opened, **arrays)

    def _parts(self) -> Iterator[tuple[int, int]]:
        size = self._request.shard_size
        return ((start, min(start + size, len(self))) for start in range(0, len(self), size))

    def _path(self, start: int) -> Path:
        return self._folder / f"{start:08d}.npz"

    def _check(self, start: int) -> None:
        self._opened(start, lambda _: None)

    def _read(self, start: int) -> NDArray[np.uint8]:
        images: NDArray[np.uint8] = self._opened(start, lambda archive: archive.read("images"))
        return images

    def _opened(self, start: int, use: Callable[[Archive], Any]) -> Any:
        """Open a shard, check that it belongs to this request, and return the result of ``use``."""
        file = self._path(start)
        try:
            with open_npz(file) as archive:
                fault = self._fault(archive, start)
                made = None if fault else use(archive)
        except Exception as error:  # damaged bytes can raise anything
            raise OutputError(f"cannot read the shard {file}: {reading_fault(error)}", hint=_AGAIN) from error
        if fault:
            raise OutputError(f"the shard {file} is not of this run: {fault}", hint=_AGAIN)
        return made

    def _fault(self, archive: Archive, start: int) -> str:
        labels = self._request.labels
        expected = {"images"} if labels is None else {"images", "labels"}
        if set(archive.names) != expected:
            held = ", ".join(sorted(archive.names)) or "nothing"
            return f"it holds {held}, expected {', '.join(sorted(expected))}"
        stop = min(start + self._request.shard_size, len(self))
        images = Header(np.dtype(np.uint8), (stop - start, *self.image_shape))
        if archive.header("images") != images:
            return f"its images are {archive.header('images')}, expected {images}"
        if labels is not None and not np.array_equal(archive.read("labels"), labels[start:stop]):
            return "its labels are others"
        return ""
