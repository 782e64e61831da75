"""Read arrays of .npz files: sizes are known before anything is decompressed; pickles are refused.

:func:`open_npz` opens a file once; :class:`NpzFile` keeps the headers and opens the file for each reading.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from admtrt.errors import DataError
from admtrt.reading import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_SUFFIX = ".npy"
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_AGAIN = "Expected a file of numpy.savez."


class Header(NamedTuple):
    """Header of an array; ``by_columns`` means Fortran order."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    by_columns: bool = False

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}{' stored column by column' * self.by_columns}"


class _KnownError(ValueError):
    """A known fault, described for people."""


class Archive:
    """An opened .npz file, see :func:`open_npz`.

    Attributes:
        names: names of its arrays.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        members = archive.namelist()
        if len(set(members)) < len(members):
            raise _KnownError("it holds two members of one name")
        self.names = tuple(name.removesuffix(_SUFFIX) for name in members if name.endswith(_SUFFIX))

    def header(self, name: str) -> Header:
        """Type and shape of one array, checked against the size of its member."""
        with self._archive.open(name + _SUFFIX) as member:
            return self._header(name, member)

    def read(self, name: str) -> NDArray[Any]:
        """Read one array of numbers or strings."""
        self.header(name)
        with self._archive.open(name + _SUFFIX) as member:
            array: NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
        return array

    def blocks(self, name: str, rows: int) -> Iterator[NDArray[Any]]:
        """Yield one array in blocks of rows, so that it need not fit in memory."""
        with self._archive.open(name + _SUFFIX) as member:
            header = self._header(name, member)
            if header.by_columns:
                raise _KnownError(f"{name} is {header}")
            each = math.prod(header.shape[1:]) * header.dtype.itemsize
            for first in range(0, header.shape[0], rows):
                count = min(rows, header.shape[0] - first)
                data = member.read(count * each)
                yield np.frombuffer(data, header.dtype).reshape(count, *header.shape[1:])

    def _header(self, name: str, member: IO[bytes]) -> Header:
        shape, fortran, dtype = _HEADERS[np.lib.format.read_magic(member)](member)
        start = member.tell()
        if dtype.hasobject:
            raise _KnownError(f"{name} holds Python objects, which are never loaded")
        size = start + math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size != self._archive.getinfo(name + _SUFFIX).file_size:
            raise _KnownError(f"{name} is shorter or longer than its header says")
        return Header(dtype, tuple(map(int, shape)), fortran and len(shape) > 1)


@contextlib.contextmanager
def open_npz(source: Path | IO[bytes]) -> Iterator[Archive]:
    """Open an .npz file, given as a path or an open file. No array is read yet.

    Raises:
        Exception: of any kind, from here and from :class:`Archive`, if the file is damaged or not an .npz
            file; :func:`reading_fault` describes it.
    """
    given = open_regular(source) if isinstance(source, Path) else contextlib.nullcontext(source)
    with given as opened, zipfile.ZipFile(opened) as archive:
        yield Archive(archive)


def reading_fault(error: Exception) -> str:
    """Describe why an .npz file is unreadable; the library's own messages would mislead."""
    told = error.strerror if isinstance(error, OSError) else None
    return told or "it is truncated, damaged or something else"


@dataclass(frozen=True)
class Member:
    """One array of an :class:`NpzFile`, of which only the header has been read."""

    file: Path
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def blocks(self, rows: int) -> Iterator[NDArray[Any]]:
        """Yield blocks of rows.

        Raises:
            DataError: if the file is damaged.
        """
        with _reading(self.file) as archive:
            yield from archive.blocks(self.name, rows)

    def read(self) -> NDArray[Any]:
        """Read the whole array, which should be small.

        Raises:
            DataError: if the file is damaged, or this is a single number.
        """
        if not self.shape:
            raise DataError(f"{self.file}: {self.name} is a single number", hint=_AGAIN)
        with _reading(self.file) as archive:
            return archive.read(self.name)


@dataclass(frozen=True)
class NpzFile:
    """The arrays of an .npz file by name; the file is opened for each reading."""

    file: Path
    members: dict[str, Member]

    @classmethod
    def open(cls, file: Path) -> Self:
        """Read the header of every array.

        Raises:
            DataError: if the file is damaged or not an .npz file, or an array cannot be read by rows.
        """
        with _reading(file) as archive:
            headers = {name: archive.header(name) for name in archive.names}
        for name, header in headers.items():
            if header.by_columns:
                raise DataError(f"{file}: {name} is {header}", hint="Save it with numpy.ascontiguousarray.")
        return cls(file, {name: Member(file, name, *header[:2]) for name, header in headers.items()})

    def __contains__(self, name: str) -> bool:
        return name in self.members

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    @property
    def names(self) -> str:
        """The names of its arrays, for a message."""
        return ", ".join(sorted(self.members)) or "nothing"


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[Archive]:
    """Open the file, and convert any exception of the readers to one error."""
    try:
        with open_npz(file) as archive:
            yield archive
    except Exception as error:  # damaged bytes make zipfile, zlib and numpy raise anything
        told = str(error) if isinstance(error, _KnownError) else reading_fault(error)
        raise DataError(f"cannot read {file}: {told}", hint=_AGAIN) from None
