"""Members of .npz files, read by rows: an archive of 50,000 images never stands in memory."""

from __future__ import annotations

import contextlib
import math
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from admtrt.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_AGAIN = "Expected a file of numpy.savez: arr_0 uint8 [N, H, W, C], or mu and sigma, or features as 'pool'."


@dataclass(frozen=True)
class Member:
    """One array of an archive: its type and shape, from its header alone."""

    file: Path
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def blocks(self, rows: int) -> Iterator[NDArray[Any]]:
        """Consecutive rows, as many at once.

        Raises:
            DataError: if the file is damaged.
        """
        each = math.prod(self.shape[1:]) * self.dtype.itemsize
        with (
            _reading(self.file),
            zipfile.ZipFile(self.file) as archive,
            archive.open(f"{self.name}.npy") as raw,
        ):
            _header(raw)
            for first in range(0, self.shape[0], rows):
                count = min(rows, self.shape[0] - first)
                data = raw.read(count * each)
                if len(data) != count * each:
                    raise EOFError
                yield np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])
            raw.read(1)  # the end, at which the archive's checksum is compared

    def read(self) -> NDArray[Any]:
        """All of it; for what is small."""
        if not self.shape:
            raise DataError(f"{self.file}: {self.name} is a single number", hint=_AGAIN)
        return joined(self.blocks(4096), self.shape[0]) if self.shape[0] else np.empty(self.shape, self.dtype)


def joined(parts: Iterable[NDArray[Any]], rows: int) -> NDArray[Any]:
    """Parts as one array of so many rows, of which there is never a second copy."""
    whole, first = None, 0
    for part in parts:
        if whole is None:
            whole = np.empty((rows, *part.shape[1:]), part.dtype)
        whole[first : first + len(part)] = part
        first += len(part)
    assert whole is not None
    assert first == rows
    return whole


class Archive:
    """An .npz file: its members by name.

    Raises:
        DataError: if it is none, or is damaged.
    """

    def __init__(self, file: Path, members: dict[str, Member]) -> None:
        self.file = file
        self.members = members

    @classmethod
    def open(cls, file: Path) -> Self:
        """Read the headers of every array; nothing pickled is ever loaded."""
        members = {}
        with _reading(file), zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if not info.filename.endswith(".npy"):
                    continue
                name = info.filename.removesuffix(".npy")
                with archive.open(info) as raw:
                    shape, fortran, dtype = _header(raw)
                    start = raw.tell()
                if dtype.hasobject:
                    raise DataError(
                        f"{file}: {name} holds Python objects, which are never loaded", hint=_AGAIN
                    )
                if fortran and len(shape) > 1:
                    raise DataError(
                        f"{file}: {name} is stored column by column",
                        hint="Save it with numpy.ascontiguousarray.",
                    )
                if info.file_size != start + math.prod(shape) * dtype.itemsize:
                    raise EOFError
                members[name] = Member(file, name, dtype, tuple(shape))
        return cls(file, members)

    def __contains__(self, name: str) -> bool:
        return name in self.members

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    @property
    def names(self) -> str:
        """What it holds, for a message."""
        return ", ".join(sorted(self.members)) or "nothing"


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Whatever the readers say of damaged bytes, as one message."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # damaged bytes make zipfile, zlib and numpy raise almost anything
        told = error.strerror if isinstance(error, OSError) else None
        raise DataError(
            f"cannot read {file}: {told or 'it is no .npz file, truncated or damaged'}", hint=_AGAIN
        ) from None


def _header(raw: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(raw)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = reader(raw)
    return shape, fortran, dtype
