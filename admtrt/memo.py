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

_LIMIT = 4096  # entries of one memo; the oldest are dropped
_SETTLED = 2.0  # seconds: a newer file could change again within the same clock tick
_LARGEST = 2**24  # bytes


def cache_folder() -> Path | None:
    """``$XDG_CACHE_HOME/admtrt``, else ``~/.cache/admtrt``, which need not exist; None without a home."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if chosen.is_absolute():  # the XDG specification ignores relative paths
        return chosen / "admtrt"
    try:
        return Path.home() / ".cache" / "admtrt"
    except RuntimeError:
        return None


class Memo:
    """JSON values by key, in one file of the cache folder.

    A file that is missing, damaged, or writable by other users counts as empty. A folder that cannot be
    written is no error.
    """

    def __init__(self, name: str) -> None:
        folder = cache_folder()
        self._file = None if folder is None else folder / f"{name}.json"
        self._values = self._read()

    def get(self, key: str) -> Any:
        """The value, or None."""
        return self._values.get(key)

    def update(self, values: Mapping[str, Any]) -> None:
        """Add values to the file, keeping those that other processes have added."""
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
    """SHA-256 of files, remembered under each file's identity, which changes when the file does.

    The system updates a file's times at every write; for a memory-mapped file, at the first change of a page
    since the page was written back. The file is therefore synced before its times are read, so that every
    later change shows. Not detected are changes through a mapping in tmpfs, which writes nothing back, and
    changes by somebody who writes to the disk directly or sets the clock.
    """

    def __init__(self, memo: Memo | None) -> None:
        self._memo = memo
        self._read: dict[str, str] = {}

    def __call__(self, file: Path) -> tuple[str, str]:
        """The digest of a file, and its identity before it was read."""
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
        """Save new digests for the next process."""
        if self._memo is not None:
            self._memo.update(self._read)


def file_identity(file: Path) -> str:
    """Inode, size and times of a file as a text, which changes whenever the file does."""
    status = file.stat()
    changing = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return ":".join([*map(str, changing), str(file)])
