"""Start-up times: imports, the command line, opening a bundle."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from admtrt.runtime.machine import package_environment

_TIMES = 3
_IMPORT = "import time; t = time.perf_counter(); import admtrt; print(time.perf_counter() - t)"
_OPEN = (
    "import sys, time; from admtrt.bundle import Bundle; t = time.perf_counter(); Bundle.open(sys.argv[1]); "
    "print(time.perf_counter() - t)"
)


def measure_startup(bundle: Path) -> dict[str, float]:
    """Measure seconds, each in a new process; repeated measurements give the median.

    The bundle is opened twice: first without remembered hashes, so that every byte is hashed, then with them.
    """
    seconds = {
        "import admtrt": statistics.median(float(_python("-c", _IMPORT)) for _ in range(_TIMES)),
        "admtrt --help": statistics.median(_seconds_of_help() for _ in range(_TIMES)),
    }
    with tempfile.TemporaryDirectory(prefix="admtrt-bench-") as cache:
        for name in ("open the bundle", "open it again"):
            seconds[name] = float(_python("-c", _OPEN, str(bundle), cache=cache))
    return seconds


def _seconds_of_help() -> float:
    began = time.perf_counter()
    _python("-m", "admtrt", "--help")
    return time.perf_counter() - began


def _python(*arguments: str, cache: str | None = None) -> str:
    """Run this interpreter with this package on its path; returns its stdout."""
    environment = package_environment()
    if cache is not None:
        environment["XDG_CACHE_HOME"] = cache
    done = subprocess.run(  # noqa: S603
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout
