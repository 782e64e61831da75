"""Cache between runs, in the user's cache folder: losing it costs time, never a result."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from admtrt.errors import OutputError
from admtrt.files import atomic_file, sha256_of
from admtrt.reading import open_regular, parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping

_LIMIT = 4096  # entries of one memo: the oldest make room
_SETTLED = 2.0  # seconds: a file that changed later than its clock's tick could change again unseen
_LARGEST = 2**24  # bytes


def cache_folder() -> Path | None:
    """``$XDG_CACHE_HOME/admtrt``, else ``~/.cache/admtrt``, which need not exist; None without a home."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if chosen.is_absolute():  # the specification says to ignore a relative one
        return chosen / "admtrt"
    try:
        return Path.home() / ".cache" / "admtrt"
    except RuntimeError:
        return None


class Memo:
    """JSON values by key, in one file of the cache folder.

    A file that is missing, damaged, or could have been written by another user is as good as empty; a folder
    that cannot be written is no error.
    """

    def __init__(self, name: str) -> None:
        folder = cache_folder()
        self._file = None if folder is None else folder / f"{name}.json"
        self._values = self._read()

    def get(self, key: str) -> Any:
        """The value, or None."""
        return self._values.get(key)

    def update(self, values: Mapping[str, Any]) -> None:
        """Remember values, beside what other processes have remembered since."""
        if self._file is None or not values:
            return
        merged = {key: value for key, value in self._read().items() if key not in values} | dict(values)
        self._values = dict(list(merged.items())[-_LIMIT:])
        try:
            with atomic_file(self._file) as temporary:
                temporary.touch(mode=0o600)
                temporary.write_text(json.dumps(self._values), encoding="utf-8")
        except OutputError:
            return

    def _read(self) -> dict[str, Any]:
        if self._file is None:
            return {}
        try:
            with open_regular(self._file) as opened:
                status = os.fstat(opened.fileno())
                foreign = status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
                if foreign or status.st_size > _LARGEST:
                    return {}
                values = parse_json(opened.read(_LARGEST))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}


class FileHashes:
    """SHA-256 of files, each remembered under everything that changes when the file does.

    The system notes the time of every write to a file; where the file is mapped, of the first change of a
    page since it was written out. Written out before its times are read, a file shows every later change. In
    file systems in memory (tmpfs), which write nothing out, a change through a mapping stays unseen; and no
    memo helps against one who writes to the disk itself or sets the machine's clock.
    """

    def __init__(self, memo: Memo | None) -> None:
        self._memo = memo
        self._read: dict[str, str] = {}

    def __call__(self, file: Path) -> tuple[str, str]:
        """The digest of a file, and the identity that it had before it was read."""
        with open_regular(file) as opened, contextlib.suppress(OSError):
            os.fsync(opened.fileno())
        identity = file_identity(file)
        known = None if self._memo is None else self._memo.get(identity)
        if isinstance(known, str):
            return known, identity
        digest = sha256_of(file)
        if identity == file_identity(file) and time.time() - file.stat().st_ctime > _SETTLED:
            self._read[identity] = digest
        return digest, identity

    def remember(self) -> None:
        """Keep what was read for the next process."""
        if self._memo is not None:
            self._memo.update(self._read)


def file_identity(file: Path) -> str:
    """Inode, size and times of a file: a text that changes whenever the file does."""
    status = file.stat()
    changing = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return ":".join([*map(str, changing), str(file)])
