"""Atomic writes: a reader sees the old state or the new one, never a mixture.

Files are written in a temporary folder beside the target, ``.admtrt-XXXXXXXX.tmp``, whose lock the writer
holds. The system releases the lock of a killed process. The next writer to the same place removes unlocked
temporary folders.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from admtrt.errors import OutputError
from admtrt.reading import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator

_TEMPORARY = re.compile(r"\.admtrt-[0-9a-f]{8}\.tmp")
_LOCK = ".lock"
_NO_REPLACE, _EXCHANGE = 1, 2  # flags of Linux's renameat2


class TakenError(OutputError):
    """The target exists but must be new."""


@contextlib.contextmanager
def atomic_file(path: Path, *, replace: bool = True, sweep: bool = True) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` when the block ends without an error.

    Args:
        path: the file; its folder is created.
        replace: False raises if ``path`` exists when the block ends, and leaves it.
        sweep: remove leftovers of killed writers in the folder. To write many files, pass False and call
            :func:`remove_stale` once.

    Raises:
        OutputError: if ``path`` exists or cannot be written; an existing file is left unchanged.
    """
    with temporary_folder(path, sweep=sweep) as folder:
        temporary = folder / path.name
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        if replace:
            temporary.replace(path)
        else:
            _rename_to_new(temporary, path)


@contextlib.contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``path`` when the block ends without an error.

    On Linux the old and the new directory are exchanged atomically, so that a kill leaves one or the other.

    Raises:
        OutputError: if ``path`` exists and ``overwrite`` is false, or it cannot be written.
    """
    if path.exists() and not overwrite:
        raise _taken(path)
    target = Path(os.path.realpath(path))  # "." has no name to derive a sibling from
    with temporary_folder(target, named=path) as folder:
        temporary = folder / target.name
        temporary.mkdir()
        yield temporary
        if overwrite and target.exists():
            _swap_directories(temporary, target)
        else:
            _rename_to_new(temporary, target)


@contextlib.contextmanager
def temporary_folder(path: Path, *, sweep: bool = True, named: Path | None = None) -> Iterator[Path]:
    """Yield a new locked folder beside ``path``, which is removed at the end.

    OS errors in the block are reported for ``path``, or for ``named``, the path as the user gave it.

    Raises:
        OutputError: if the place cannot be written.
    """
    shown, home = named or path, path.parent
    untouched = "What was there before is untouched." if os.path.lexists(path) else ""
    with _faults_of(None, shown, untouched):
        home.mkdir(parents=True, exist_ok=True)
        if sweep:
            remove_stale(home)
        with _held_folder(home) as folder, _faults_of(folder / path.name, shown, untouched):
            yield folder


def is_temporary(name: str) -> bool:
    """True for a temporary folder of a running or killed writer."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_stale(home: Path) -> None:
    """Remove temporary folders of killed writers: only unlocked ones of this user.

    A folder stays if the file system has no locks or it cannot be removed.
    """
    with contextlib.suppress(OSError), os.scandir(home) as entries:
        found = [Path(entry) for entry in entries if is_temporary(entry.name)]
        for folder in found:
            with contextlib.suppress(OSError):
                status = folder.lstat()
                if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                    with _lock_of(folder) as held:
                        if held:
                            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _held_folder(home: Path) -> Iterator[Path]:
    while True:
        folder = home / f".admtrt-{uuid.uuid4().hex[:8]}.tmp"
        folder.mkdir()
        try:
            with _lock_of(folder, needed=False) as held:
                if held:
                    yield folder
                    return
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _lock_of(folder: Path, *, needed: bool = True) -> Iterator[bool]:
    """Lock a temporary folder; False if another process holds the lock or has removed the folder.

    Args:
        folder: the folder to lock.
        needed: False continues without a lock if the file system has none.
    """
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        except OSError:
            held = not needed
        else:
            held = _is_at(lock, folder / _LOCK)
        yield held
    finally:
        os.close(lock)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for and hold a folder's lock: only one process at a time runs the block.

    If the file system cannot lock folders, the block runs without a lock.

    Raises:
        OutputError: if the folder cannot be made or opened.
    """
    with _faults_of(None, folder, ""):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _rename_to_new(source: Path, target: Path) -> None:
    """Rename atomically to a path that must not exist.

    Raises:
        OutputError: if it exists.
    """
    try:
        if source.is_dir():
            source.rename(target)  # replaces at most an empty directory
        elif not _renameat2(source, target, _NO_REPLACE):
            _link_to_new(source, target)
    except FileExistsError:
        raise _taken(target) from None
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise _taken(target) from None
        raise


def _link_to_new(source: Path, target: Path) -> None:
    """Fallback for file systems without exclusive rename: a hard link, or an empty file first."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links either; a kill between the two steps leaves the empty file
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
        source.replace(target)


def _taken(path: Path) -> TakenError:
    return TakenError(
        f"{path} already exists", hint="Choose another place, or pass --overwrite to replace it."
    )


def _swap_directories(new: Path, old: Path) -> None:
    if _exchange(new, old):
        return
    retired = old.with_name(f".{old.name}.{uuid.uuid4().hex[:8]}.old")  # not swept after a kill
    try:
        old.rename(retired)
        new.rename(old)
    except BaseException:
        if retired.exists() and not old.exists():
            retired.rename(old)
        raise
    retired.rename(new)


def _exchange(left: Path, right: Path) -> bool:
    """Exchange two paths atomically; False if the system or the file system does not support it."""
    return _renameat2(left, right, _EXCHANGE)


def _renameat2(left: Path, right: Path, flag: int) -> bool:
    """Call Linux's renameat2; False if it fails for any reason."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here = -100  # AT_FDCWD
    return rename is not None and rename(here, os.fsencode(left), here, os.fsencode(right), flag) == 0


@contextlib.contextmanager
def _faults_of(temporary: Path | None, path: Path, untouched: str) -> Iterator[None]:
    """Convert OS errors to output errors that name ``path`` instead of the temporary folder."""
    try:
        yield
    except OutputError as error:
        if temporary is None or str(temporary) not in error.message:
            raise
        message = error.message.replace(str(temporary), str(path))
        raise OutputError(message, hint=error.hint or untouched) from error
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}", hint=untouched) from error


def check_place(path: Path, *, folder: bool = False) -> None:
    """Refuse a file or folder that cannot be written, before the work that makes its content.

    Raises:
        OutputError: naming the path.
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
    """Hexadecimal SHA-256 of a regular file.

    Raises:
        OSError: if it cannot be read or is not a regular file.
    """
    with open_regular(path) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
