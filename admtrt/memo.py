"""Cache between runs, in the user's cache folder: losing it costs time, never a result."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from admtrt.errors import OutputError
from admtrt.files import atomic_file
from admtrt.reading import open_regular, parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping

_LIMIT = 4096  # entries of one memo: the oldest make room
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
