"""Read untrusted files: regular files only, and no more bytes than a limit."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from io import BufferedReader
    from pathlib import Path

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file without blocking. A pipe would wait for a writer; a device may never end.

    Raises:
        OSError: if it cannot be opened or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_small(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: if it cannot be read, is larger, or is not a regular file.
    """
    with open_regular(path) as opened:
        content = opened.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit} bytes", str(path))
    return content


def read_json(path: Path, limit: int) -> Any:
    """The value in a regular JSON file of at most ``limit`` bytes.

    Raises:
        OSError: as :func:`read_small`.
        ValueError: if it is not JSON in UTF-8, or nested too deeply.
    """
    return parse_json(read_small(path, limit))


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON document.

    Raises:
        ValueError: if it is not JSON in UTF-8, nested too deeply, or contains a string that UTF-8 cannot
            encode.
    """
    document = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        value = json.loads(document)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _SURROGATE.search(document) is not None:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("a text in it has half of a surrogate pair") from None
    return value
