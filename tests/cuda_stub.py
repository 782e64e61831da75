"""The stub driver of ``cuda_stub.c`` for the real cuda-core: building, loading and controlling it.

Only cuda-core finds the stub. Other libraries of the process do not, so tests that simulate a machine without
a driver can run in the same process. If the stub cannot be built, tests that need it are skipped; with
``ADMTRT_REQUIRE_CUDA_STUB=1``, set by CI, they fail.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ORDERS = ("lazy", "eager", "1", "2", "3")
"""When the device does its work: as late as allowed, at once, or in an order by a seed."""
GPU_NAME = "GeForce Double"

_SOURCE = Path(__file__).with_name("cuda_stub.c")
_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_COUNTED = ("bytes", "pinned", "streams", "events", "graphs", "pending")
_kept: list[Any] = []  # keeps callbacks alive that the device may still call


def _absent(reason: str) -> None:
    if os.environ.get("ADMTRT_REQUIRE_CUDA_STUB"):
        pytest.fail(f"the stub of the CUDA driver is required here: {reason}")
    pytest.skip(f"no stub of the CUDA driver: {reason}")


@cache
def library_path() -> str:
    """Path of the stub driver, built once per process."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        _absent("there is no C compiler")
    package = find_spec("nvidia")
    headers = [
        header
        for folder in (package.submodule_search_locations or () if package else ())
        for header in sorted(Path(folder).glob("cu*/include/cuda.h"))
    ]
    if not headers:
        _absent("there is no cuda.h; install it with: pip install nvidia-cuda-runtime")
    if find_spec("cuda") is None or find_spec("cuda.core") is None:
        _absent("cuda-core is not installed")
    folder = tempfile.TemporaryDirectory(prefix="admtrt-cuda-stub-")
    atexit.register(folder.cleanup)
    path = Path(folder.name) / "cuda_stub.so"
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"]
    subprocess.run(
        [str(compiler), *flags, f"-I{headers[-1].parent}", "-o", path, _SOURCE, "-ldl"], check=True
    )
    return str(path)


@cache
def _driver() -> Any:
    """The loaded stub driver, passed to cuda-core, which searches for a driver once per process."""
    path, open_library = library_path(), ctypes.CDLL

    def opened(name: Any, *arguments: Any, **options: Any) -> Any:
        return open_library(path if name == "libcuda.so.1" else name, *arguments, **options)

    core = importlib.import_module("cuda.core")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctypes, "CDLL", opened)
        device = core.Device(0)
        device.set_current()
    if device.name != GPU_NAME:
        _absent("cuda-core has found this machine's own driver before")
    driver = open_library(path)
    driver.stubReach.restype = ctypes.c_void_p
    driver.stubReach.argtypes = [ctypes.c_uint64, ctypes.c_size_t]
    driver.stubTakeMemory.restype = ctypes.c_uint64
    driver.stubTakeMemory.argtypes = [ctypes.c_size_t]
    driver.stubGiveMemory.argtypes = [ctypes.c_uint64]
    driver.stubTake.restype = ctypes.c_size_t
    driver.stubTake.argtypes = [ctypes.c_bool, ctypes.c_char_p, ctypes.c_size_t]
    driver.stubReset.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_size_t]
    return driver


def reset(order: str = "lazy", *, memory: int = 2**30) -> None:
    """Reset the GPU: this many free bytes, and no work of earlier tests."""
    kind = {"lazy": 0, "eager": 1}.get(order, 2)
    _driver().stubReset(kind, 0 if kind < 2 else int(order), memory)
    _kept.clear()


def fail(function: str, code: int, *, call: int = 1) -> None:
    """Make a function of the driver return a code at one of its next calls; code 2 is out of memory."""
    _driver().stubFail(f"{function}:{call}:{code}".encode())


def _taken(misuses: bool) -> list[str]:
    size = _driver().stubTake(misuses, None, 0)
    text = ctypes.create_string_buffer(size + 1)
    _driver().stubTake(misuses, text, size)
    return text.value.decode().splitlines()


def log() -> list[str]:
    """The log since the last call: work enqueued (``s0: copy``), done (``done: graph``) and waited for."""
    return _taken(False)


def misuses() -> list[str]:
    """Misuses since the last call: a real device would give wrong results or crash. All work is done first.

    A test fails if any misuses are left at its end (``conftest.py``).
    """
    return _taken(True) if _driver.cache_info().currsize else []


def misuse(what: str) -> None:
    """Record a misuse."""
    _driver().stubMisuse(what.encode())


def counts() -> dict[str, int]:
    """Resources not released: bytes, page-locked blocks, streams, events, graphs; and work not done yet."""
    found = (ctypes.c_long * len(_COUNTED))()
    _driver().stubCount(found)
    return dict(zip(_COUNTED, found, strict=True))


def memory_at(address: int, size: int) -> Any:
    """The device's memory as a NumPy array; None if this range is not allocated."""
    found = _driver().stubReach(address, size)
    return None if found is None else (ctypes.c_char * size).from_address(found)


def free_memory() -> int:
    """Free device memory, in bytes."""
    left, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert _driver().cuMemGetInfo_v2(ctypes.byref(left), ctypes.byref(total)) == 0
    return left.value


def is_current() -> bool:
    """True if the device's context is current in this thread."""
    context = ctypes.c_void_p()
    _driver().cuCtxGetCurrent(ctypes.byref(context))
    return bool(context)


def capturing(stream: int) -> bool:
    """True if a stream is being captured into a graph."""
    status = ctypes.c_int()
    _driver().cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(status))
    return bool(status.value)


def wait_for(stream: int) -> int:
    """Wait for work; returns the driver's code."""
    return int(_driver().cuStreamSynchronize(ctypes.c_void_p(stream)))


def take_memory(size: int) -> int:
    """Allocate memory for a library's own use; returns its address, or 0 if there is not enough."""
    return int(_driver().stubTakeMemory(size))


def give_memory(address: int) -> None:
    """Release memory of :func:`take_memory`; a misuse while work on it is running."""
    _driver().stubGiveMemory(address)


def run(
    stream: int, name: str, work: Callable[[], None], *, reads: Sequence[int], writes: Sequence[int]
) -> int:
    """Enqueue ``work``, which reads and writes memory at these addresses; returns the driver's code."""

    def called(_: Any) -> None:
        try:
            work()
        except BaseException as error:  # exceptions cannot propagate through the driver
            misuse(f"{name}: {error!r}")

    function = _HOST_FUNCTION(called)
    _kept.append(function)
    addresses = (ctypes.c_uint64 * (len(reads) + len(writes)))(*reads, *writes)
    return int(
        _driver().stubRun(
            ctypes.c_void_p(stream), name.encode(), function, addresses, len(reads), len(addresses)
        )
    )
