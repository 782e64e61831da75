"""Arrays of .npz files whose sizes are known before a byte of them is inflated; never a pickle."""

from __future__ import annotations

import contextlib
import math
import zipfile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from admtrt.reading import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

_SUFFIX = ".npy"
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Header(NamedTuple):
    """What an array says of itself."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Archive:
    """An opened .npz file, see :func:`open_npz`.

    Attributes:
        names: of its arrays.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        members = archive.namelist()
        if len(set(members)) < len(members):
            raise ValueError("it holds two members of one name")
        self.names = tuple(name.removesuffix(_SUFFIX) for name in members if name.endswith(_SUFFIX))

    def header(self, name: str) -> Header:
        """Type and sizes of one array, which its member really has."""
        with self._archive.open(name + _SUFFIX) as member:
            shape, _, dtype = _HEADERS[np.lib.format.read_magic(member)](member)
            start = member.tell()
        if dtype.hasobject:
            raise ValueError("Object arrays cannot be loaded")
        size = start + math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size != self._archive.getinfo(name + _SUFFIX).file_size:
            raise ValueError(f"{name} is shorter or longer than its header says")
        return Header(dtype, tuple(map(int, shape)))

    def read(self, name: str) -> NDArray[Any]:
        """One array, of numbers or texts."""
        self.header(name)
        with self._archive.open(name + _SUFFIX) as member:
            array: NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
        return array


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[Archive]:
    """Open an .npz file, of which no array is read yet.

    Raises:
        Exception: of any kind, then and from :class:`Archive`, for a file that is no such archive or damaged;
            :func:`reading_fault` words it.
    """
    with open_regular(path) as opened, zipfile.ZipFile(opened) as archive:
        yield Archive(archive)


def reading_fault(error: Exception) -> str:
    """Why an .npz file cannot be read; what the library says of damaged bytes would mislead."""
    told = error.strerror if isinstance(error, OSError) else None
    return told or "it is truncated, damaged or something else"
