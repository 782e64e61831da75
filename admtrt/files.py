"""Writing files so that a reader sees the old state or the new one, never half of either."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from admtrt.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` that replaces it when the block ends without an error.

    Raises:
        OutputError: if the place cannot be written; what stood at ``path`` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with _faults_of(temporary, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling directory that becomes ``path`` when the block ends without an error.

    What it replaces disappears in the same instant, on Linux: whoever is killed leaves the one or the other.

    Raises:
        OutputError: if ``path`` exists and ``overwrite`` is false, or the place cannot be written.
    """
    if path.exists() and not overwrite:
        raise OutputError(
            f"{path} already exists", hint="Choose another place, or pass --overwrite to replace it."
        )
    target = Path(os.path.realpath(path))  # "." has no name to put another beside
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with _faults_of(temporary, path):
            temporary.mkdir(parents=True)
            yield temporary
            if overwrite and target.exists():
                _swap_directories(temporary, target)
            else:
                temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap_directories(new: Path, old: Path) -> None:
    if _exchange(new, old):
        return
    retired = new.with_suffix(".old")
    try:
        old.rename(retired)
        new.rename(old)
    except BaseException:
        if retired.exists() and not old.exists():
            retired.rename(old)
        raise
    retired.rename(new)


def _exchange(left: Path, right: Path) -> bool:
    """Swap two entries in one step with Linux's renameat2; False where it or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(left), here, os.fsencode(right), exchange) == 0


@contextlib.contextmanager
def _faults_of(temporary: Path, path: Path) -> Iterator[None]:
    """Turn faults on the way into output errors that name ``path``: nobody has heard of the temporary."""
    untouched = "What was there before is untouched." if os.path.lexists(path) else ""
    try:
        yield
    except OutputError as error:
        if str(temporary) not in error.message:
            raise
        message = error.message.replace(str(temporary), str(path))
        raise OutputError(message, hint=error.hint or untouched) from error
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}", hint=untouched) from error


def check_place(path: Path, *, folder: bool = False) -> None:
    """Refuse a file, or a folder for files, that cannot be written, before the work whose result it is for.

    Raises:
        OutputError: naming it.
    """
    home = path if folder else path.parent
    try:
        home.mkdir(parents=True, exist_ok=True)
        fault = "" if os.access(home, os.W_OK | os.X_OK) else "Permission denied"
    except OSError as error:
        fault = error.strerror or str(error)
    if not fault and not folder and path.is_dir():
        fault = "it is a folder"
    if fault:
        raise OutputError(f"cannot write {path}: {fault}", hint="Name another place.")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
