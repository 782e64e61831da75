"""Stored jobs: files that survive a kill at any moment, bounded in time and size.

A job is stored as ``<id>.request.json`` before its client gets the answer. ``<id>.end.json``, written after
``<id>.result``, marks its end. Jobs without an end are drawn again after a restart, with the same seeds and
thus the same images.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from admtrt.errors import OutputError
from admtrt.files import atomic_file, remove_stale
from admtrt.reading import read_json, read_small

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ID = re.compile(r"([0-9a-f]{8})-[0-9a-f]{24}")
_REQUEST, _END, _RESULT = ".request.json", ".end.json", ".result"
_LARGEST = 2**30  # bytes of one file


@dataclass(frozen=True)
class StoredJob:
    """A job on disk.

    Attributes:
        id: begins with the time of its creation, in seconds.
        client: name of the client.
        request: the request as received, with seeds filled in.
        end: None until the job has ended; its ``state`` is ``done``, ``failed`` or ``cancelled``.
    """

    id: str
    client: str
    request: dict[str, Any]
    end: dict[str, Any] | None = None


class Spool:
    """The folder of the jobs, used by one process at a time.

    Args:
        folder: path, created if missing.
        largest: limit for the bytes of all files.
        keep: seconds for which finished jobs are kept.

    Raises:
        OutputError: if the folder cannot be used, or another process uses it.
    """

    def __init__(self, folder: Path, *, largest: int, keep: float) -> None:
        self._folder, self._largest, self._keep = folder, largest, keep
        self._guard = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise OutputError(
                f"another server uses the spool {folder}", hint="Give each server a folder of its own."
            ) from None
        except OSError as error:
            raise OutputError(f"cannot use the spool {folder}: {error.strerror}") from None
        remove_stale(folder)
        self._size = sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())

    def close(self) -> None:
        """Release the folder for other processes."""
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def full(self) -> bool:
        """True if no further job is accepted."""
        return self._size >= self._largest

    @staticmethod
    def new_id() -> str:
        """A new id that cannot be guessed."""
        return f"{int(time.time()):08x}-{secrets.token_hex(12)}"

    def expired(self, job: str) -> bool:
        """True if a job of this id may have existed but has expired."""
        made = _ID.fullmatch(job)
        return made is not None and int(made[1], 16) + self._keep <= time.time()

    def add(self, job: StoredJob) -> None:
        """Store a new job.

        Raises:
            OutputError: if it cannot be written.
        """
        self._write(job.id + _REQUEST, _json({"client": job.client, "request": job.request}))

    def finish(self, job: str, end: dict[str, Any], result: bytes | None = None) -> None:
        """Store the end of a job and its result.

        Raises:
            OutputError: if it cannot be written.
        """
        if result is not None:
            self._write(job + _RESULT, result)
        self._write(job + _END, _json(end))

    def get(self, job: str) -> StoredJob | None:
        """The job with this id, or None."""
        if _ID.fullmatch(job) is None:
            return None
        try:
            told = read_json(self._folder / (job + _REQUEST), _LARGEST)
        except (OSError, ValueError):
            return None
        end = None
        with contextlib.suppress(OSError, ValueError):
            end = read_json(self._folder / (job + _END), _LARGEST)
        return StoredJob(job, told["client"], told["request"], end)

    def result(self, job: str) -> bytes:
        """The result of a job, as sent to clients.

        Raises:
            OSError: if it cannot be read.
        """
        return read_small(self._folder / (job + _RESULT), _LARGEST)

    def remove(self, job: str) -> None:
        """Delete a job."""
        for suffix in (_REQUEST, _RESULT, _END):  # request first: without it there is no job
            file = self._folder / (job + suffix)
            with contextlib.suppress(OSError), self._guard:
                size = file.stat().st_size
                file.unlink()
                self._size -= size

    def unfinished(self) -> list[StoredJob]:
        """Unfinished jobs, the oldest first."""
        jobs = (self.get(name) for name in sorted(self._names()))
        return [job for job in jobs if job is not None and job.end is None]

    def sweep(self) -> None:
        """Delete expired jobs and files that belong to no job."""
        now = time.time()
        for entry in list(os.scandir(self._folder)):
            name, _, suffix = entry.name.partition(".")
            if _ID.fullmatch(name) is None:
                continue
            with contextlib.suppress(OSError):
                orphan = not (self._folder / (name + _REQUEST)).exists()
                old = entry.stat().st_mtime + self._keep <= now
                if orphan or (suffix == _END[1:] and old):
                    self.remove(name)

    def _names(self) -> Iterator[str]:
        for entry in os.scandir(self._folder):
            if entry.name.endswith(_REQUEST):
                yield entry.name.removesuffix(_REQUEST)

    def _write(self, name: str, content: bytes) -> None:
        with atomic_file(self._folder / name, sweep=False) as temporary:
            temporary.write_bytes(content)
        with self._guard:
            self._size += len(content)


def _json(data: Any) -> bytes:
    return json.dumps(data, allow_nan=False).encode()
