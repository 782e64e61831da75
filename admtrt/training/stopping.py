"""Signals that ask training to end, heard between two steps: there the state can be saved."""

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
    """Outcome of a request to stop.

    Attributes:
        signal: that was heard, 0 for none.
        agreed: training ends here; set by the loop.
    """

    signal: int = 0
    agreed: bool = False

    @property
    def heard(self) -> bool:
        """True where this process was asked."""
        return self.signal != 0


@contextlib.contextmanager
def stop_requests(*, shown: bool) -> Iterator[Stop]:
    """Hear SIGINT and SIGTERM, and let them take effect at the end of the block if that was agreed.

    A second one has its effect at once. Signals that are ignored, or handled by other than Python, stay so.

    Args:
        shown: tell people on stderr that the first was heard.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
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
                os.write(2, _NOTICE)  # a buffered stream may be in the middle of something

    for number in before:
        signal.signal(number, hear)
    try:
        yield stop
    finally:
        restore()
    if stop.agreed:  # perhaps because another process was asked
        signal.raise_signal(stop.signal or signal.SIGTERM)
