"""The command ``admtrt``, and ``python -m admtrt`` for launchers such as ``torchrun -m admtrt``.

Signals are heard from the first import on: whoever is stopped says so in one line, and cleans up.
"""

from __future__ import annotations

import os
import signal
import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

_received: list[int] = []
_PATIENCE = 2  # signals that raise: the first stops, the second stops waiting; the next ends the process


def _leave_at_once() -> None:
    """Let signals end the process at once: an exception in the interpreter's shutdown is told as a fault."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is _stop:
            signal.signal(number, lambda received, _: os._exit(128 + received))


def _stop(number: int, _: FrameType | None) -> None:
    _received.append(number)
    if len(_received) > _PATIENCE:  # an exception in the middle of cleaning up would be told as a fault
        os._exit(128 + _received[0])
    if number == signal.SIGTERM:
        raise SystemExit(128 + number)
    raise KeyboardInterrupt


def _open_streams() -> None:
    """Make all three streams usable, whatever is printed.

    Who closed one wants no output; the files that are opened next would take its place.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files need be no text


def main() -> None:
    """Run the command line and exit with its code."""
    _open_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job may ignore it
        signal.signal(signal.SIGINT, _stop)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _stop)
    try:
        try:
            from admtrt.cli import run

            code = run()
        finally:
            _leave_at_once()
    except BaseException:  # libraries turn an interruption of their import into anything
        if not _received:
            raise
        sys.stderr.write("error: interrupted\n")
        code = 128 + _received[0]
    sys.exit(code)


if __name__ == "__main__":
    main()
