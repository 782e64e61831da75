"""Weights that a library maps from their file and then copies: pages that are no longer needed."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_DONTNEED = 4  # MADV_DONTNEED: a page that is read again comes from the file


def release_pages(file: Path) -> int:
    """Give the pages of a file that this process has mapped back to the system; nothing is lost.

    Returns:
        How many mappings were told; 0 where the system has no list of them.
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
