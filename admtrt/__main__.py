"""The command ``admtrt``, and ``python -m admtrt`` for launchers such as ``torchrun -m admtrt``.

Signals are heard from the first import on: whoever is stopped says so in one line, and cleans up.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

_received: list[int] = []


def _stop(number: int, _: FrameType | None) -> None:
    _received.append(number)
    if number == signal.SIGTERM:
        raise SystemExit(128 + number)
    raise KeyboardInterrupt


def _open_streams() -> None:
    """Who closed them wants no output; the files that are opened next would take their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))


def main() -> None:
    """Run the command line and exit with its code."""
    _open_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job may ignore it
        signal.signal(signal.SIGINT, _stop)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _stop)
    try:
        from admtrt.cli import run

        code = run()
    except BaseException:  # libraries turn an interruption of their import into anything
        if not _received:
            raise
        sys.stderr.write("error: interrupted\n")
        code = 128 + _received[0]
    sys.exit(code)


if __name__ == "__main__":
    main()
