"""Release the pages of weight files that a library has mapped and then copied."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

_MAPS = Path("/proc/self/maps")
_INTERVAL = 0.1  # seconds in which a library reads some hundred megabytes at most
_DONTNEED = 4  # MADV_DONTNEED: a dropped page is read from the file again


def release_pages(file: Path) -> int:
    """Return the pages of a file that this process has mapped to the system; no data is lost.

    Returns:
        The number of mappings released; 0 if the system does not list mappings.
    """
    return _release(_mappings(file))


@contextlib.contextmanager
def releasing(files: Sequence[Path]) -> Iterator[None]:
    """Keep returning the pages of these files that a library maps in this block, while it copies them.

    Otherwise the peak is a whole copy above what remains, since a library unmaps nothing before it ends. The
    mappings must last until the end of the block. Older ones are left alone: another thread may unmap them,
    and their addresses may then be memory of something else.
    """
    older = {span for file in files for span in _mappings(file)}
    done = threading.Event()

    def release() -> None:
        _release({span for file in files for span in _mappings(file)} - older)

    def work() -> None:
        while not done.wait(_INTERVAL):
            release()

    thread = threading.Thread(target=work, name="release pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        release()


def _mappings(file: Path) -> set[tuple[int, int]]:
    """Bounds of the file's mappings that this process cannot write to."""
    if not _MAPS.exists():
        return set()
    wanted, found = os.path.realpath(file), set()
    for line in _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        span, permissions, *_, path = line.split(maxsplit=5)
        if path == wanted and "w" not in permissions:
            start, end = (int(bound, 16) for bound in span.split("-"))
            found.add((start, end))
    return found


def _release(spans: Collection[tuple[int, int]]) -> int:
    libc = ctypes.CDLL(None)
    return sum(
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED) == 0
        for start, end in spans
    )
