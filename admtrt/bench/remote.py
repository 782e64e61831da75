"""Objects in child processes, which isolates their memory and turns their crashes into messages."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from admtrt.errors import AdmtrtError

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

_TERMINAL_CODE = re.compile(r"\x1b\[[0-9;]*m")
_GRACE = 5.0  # seconds for a process to exit by itself


class RemoteError(AdmtrtError):
    """A failure of the child process, in one line."""


class Remote:
    """An object created in a child process; its methods are called from here, one at a time.

    Args:
        factory: makes the object; must be importable. Arguments and results must be picklable.
        arguments: arguments of ``factory``.
        log: file for the process's stdout, stderr and tracebacks.

    Raises:
        RemoteError: if the object cannot be made.
    """

    def __init__(self, factory: Callable[..., object], *arguments: object, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, log, factory, arguments))
        self._process.start()
        theirs.close()
        try:
            self._reply()
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: object) -> Any:
        """Call a method of the object and return its result.

        Raises:
            RemoteError: if it fails, or the process is gone.
        """
        with contextlib.suppress(OSError):  # a dead process is noticed below
            self._connection.send((method, arguments))
        return self._reply()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(_GRACE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _reply(self) -> Any:
        try:
            fault, result = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(_GRACE)
            raise RemoteError(_epitaph(self._process.exitcode)) from None
        if fault is not None:
            raise RemoteError(fault)
        return result


def run_remotely(function: Callable[..., object], *arguments: object, log: Path) -> Any:
    """Run a function in a child process and return its picklable result.

    Raises:
        RemoteError: if it fails.
    """
    remote = Remote(_Deferred, function, arguments, log=log)
    try:
        return remote.call("run")
    finally:
        remote.close()


class _Deferred:
    def __init__(self, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
        self.run = lambda: function(*arguments)


def peak_memory() -> int:
    """The peak resident memory of this process, in bytes, including touched pages of mapped files."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss starts from the parent's memory at the fork
        lines = status.read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _serve(
    connection: Connection, log: Path, factory: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and stops this process
    with log.open("ab", buffering=0) as sink:
        for stream in (1, 2):
            os.dup2(sink.fileno(), stream)
    made: Any = None

    def make() -> None:
        nonlocal made
        made = factory(*arguments)

    call: Callable[[], Any] = make
    while True:
        fault, result = None, None
        try:
            result = call()
        except Exception as error:  # an exception fails only this row
            traceback.print_exc()
            fault = _one_line(error)
        connection.send((fault, result))
        try:
            method, given = connection.recv()
        except EOFError:
            return
        call = _bound(made, method, given)


def _bound(made: Any, method: str, given: tuple[object, ...]) -> Callable[[], Any]:
    return lambda: getattr(made, method)(*given)


def _one_line(error: BaseException) -> str:
    """The first line of the root cause, which libraries wrap in pages of advice."""
    if isinstance(error, AdmtrtError):
        return " ".join(f"{error.message}. {error.hint}".split()) if error.hint else error.message
    while error.__cause__ is not None:
        error = error.__cause__
    lines = (line.strip() for line in _TERMINAL_CODE.sub("", str(error)).splitlines())
    first = next(filter(None, lines), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _epitaph(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        cause = ", as when memory runs out" if -code == signal.SIGKILL else ""
        return f"its process was ended by {name}{cause}"
    return f"its process ended with code {code}"
