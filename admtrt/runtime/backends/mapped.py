"""Release the pages of weight files that a library has mapped and then copied."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_DONTNEED = 4  # MADV_DONTNEED: a dropped page is read from the file again


def release_pages(file: Path) -> int:
    """Return the pages of a file that this process has mapped to the system; no data is lost.

    Returns:
        The number of mappings released; 0 if the system does not list mappings.
    """
    if not _MAPS.exists():
        return 0
    wanted, libc, told = os.path.realpath(file), ctypes.CDLL(None), 0
    for line in _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        span, *_, path = line.split(maxsplit=5)
        if path != wanted:
            continue
        start, end = (int(bound, 16) for bound in span.split("-"))
        told += libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED) == 0
    return told
