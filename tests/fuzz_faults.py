"""A command line with faults that the fuzzing harness must detect; loaded into a worker."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import admtrt.cli


def _run(arguments: Sequence[str]) -> int:
    match arguments[0]:
        case "hang":
            time.sleep(60)
        case "die":
            os.abort()
        case "raise":
            raise KeyError("x")
        case "grow":
            return len(bytearray(os.urandom(1 << 20) * 400)) and 0
    return 2


admtrt.cli.run = _run  # type: ignore[assignment]
