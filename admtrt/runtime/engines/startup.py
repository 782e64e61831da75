"""Find out in a child process whether TensorRT can start CUDA here.

Where it cannot, TensorRT logs an error and returns a runtime whose use or deletion crashes the process.
``python -m`` this module tries the given library and writes its complaints to stdout.
"""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING, NoReturn

from admtrt.errors import EngineError
from admtrt.runtime.engines.library import logger_of
from admtrt.runtime.machine import package_environment

if TYPE_CHECKING:
    from admtrt.runtime.engines.library import Library

_SECONDS = 120.0  # the first use of a GPU can take tens of seconds


def require_start(library: Library) -> None:
    """Check that TensorRT can be used in this process. TensorRT-RTX needs no check: it raises an error.

    Raises:
        EngineError: with the library's messages, or how the child process ended.
    """
    fault = "" if library.flavor == "rtx" else _fault(library.module.__name__)
    if fault:
        raise EngineError(
            f"{library} cannot start CUDA: {fault}",
            hint="Update the NVIDIA driver, or install the TensorRT of the driver's CUDA; see: admtrt doctor",
        )


@functools.cache
def _fault(module: str) -> str:
    command = [sys.executable, "-P", "-m", __name__, module]  # -P: nothing from the working directory
    try:
        done = subprocess.run(  # noqa: S603
            command,
            env=package_environment(),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"a process that tried it gave no answer for {_SECONDS:.0f} seconds"
    if done.returncode < 0:
        return f"a process that tried it was ended by signal {-done.returncode}"
    if done.returncode:
        return " ".join(done.stderr.split()[-40:]) or f"a process that tried it ended with {done.returncode}"
    return " ".join(done.stdout.split())


def _try(module: str) -> NoReturn:
    trt = importlib.import_module(module)
    logger = logger_of(trt)
    runtime = trt.Runtime(logger)
    if not logger.errors:
        runtime.engine_host_code_allowed = False
    sys.stdout.write(logger.said())
    sys.stdout.flush()
    os._exit(0)  # skip the runtime's destructor


if __name__ == "__main__":
    _try(sys.argv[1])
