"""Defer signals that stop training to the end of a step, when the state can be saved."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_NOTICE = b"\nstopping at the end of this step, to save it; the same signal again stops at once\n"


@dataclass
class Stop:
    """The state of a request to stop.

    Attributes:
        signal: the received signal, 0 for none.
        agreed: whether all processes stop now; set by the loop.
    """

    signal: int = 0
    agreed: bool = False

    @property
    def heard(self) -> bool:
        """True if this process has received a signal."""
        return self.signal != 0


@contextlib.contextmanager
def stop_requests(*, shown: bool) -> Iterator[Stop]:
    """Catch SIGINT and SIGTERM; they take effect at the end of the block if ``agreed`` is set.

    A second signal takes effect at once. Signals that are ignored, or not handled by Python, are left alone.

    Args:
        shown: confirm the first signal on stderr.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # only it receives signals
        yield stop
        return
    before = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        if (handler := signal.getsignal(number)) not in (None, signal.SIG_IGN)
    }

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def hear(number: int, _: object) -> None:
        if stop.heard:
            restore()
            signal.raise_signal(number)
        stop.signal = number
        if shown:
            with contextlib.suppress(OSError):
                os.write(2, _NOTICE)  # not print: a buffered stream may be in the middle of a write

    for number in before:
        signal.signal(number, hear)
    try:
        yield stop
    finally:
        restore()
    if stop.agreed:  # possibly because another process got the signal
        signal.raise_signal(stop.signal or signal.SIGTERM)
