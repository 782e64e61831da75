"""The command ``admtrt``, and ``python -m admtrt`` for launchers such as ``torchrun -m admtrt``.

Signals are handled from the first import on: a stopped process cleans up and says so in one line.
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
_PATIENCE = 2  # signals that raise: the first stops, the second stops waiting; the third kills


def _leave_at_once() -> None:
    """Let signals end the process at once: an exception during interpreter shutdown prints a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is _stop:
            signal.signal(number, lambda received, _: os._exit(128 + received))


def _stop(number: int, _: FrameType | None) -> None:
    _received.append(number)
    if len(_received) > _PATIENCE:  # do not raise into the cleanup
        os._exit(128 + _received[0])
    if number == signal.SIGTERM:
        raise SystemExit(128 + number)
    raise KeyboardInterrupt


def _open_streams() -> None:
    """Make all three standard streams usable, whatever is printed.

    Reopen closed standard streams on /dev/null, so that no later file gets descriptors 0 to 2.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor: this one
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # like stderr: file names may be invalid UTF-8


def main() -> None:
    """Run the command line and exit with its code."""
    _open_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job may ignore SIGINT
        signal.signal(signal.SIGINT, _stop)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _stop)
    try:
        try:
            from admtrt.cli import run

            code = run()
        finally:
            _leave_at_once()
    except BaseException:  # libraries convert an interrupt during their import to other exceptions
        if not _received:
            raise
        sys.stderr.write("error: interrupted\n")
        code = 128 + _received[0]
    sys.exit(code)


if __name__ == "__main__":
    main()
