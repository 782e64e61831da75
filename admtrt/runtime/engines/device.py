"""Query the driver for this machine's GPUs. Needs no package, and works without a GPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NAME_LENGTH = 256


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as the driver calls it.
        compute_capability: 89 for 8.9.
        memory: bytes.
    """

    name: str
    compute_capability: int
    memory: int

    def __str__(self) -> str:
        return f"{self.name} (SM{self.compute_capability})"


@dataclass(frozen=True)
class Driver:
    """A GPU as the driver describes it.

    Attributes:
        cuda: newest CUDA version that the driver supports, for instance "13.0"; None without a driver.
        gpus: in the driver's order.
        fault: why there is no driver or no GPU.
    """

    cuda: str | None
    gpus: tuple[Gpu, ...]
    fault: str = ""

    @property
    def gpu(self) -> Gpu | None:
        """The first GPU, which is the one that is used."""
        return self.gpus[0] if self.gpus else None


def query_driver() -> Driver:
    """Ask the driver; a machine without one is no error."""
    library = _load()
    if library is None:
        return Driver(cuda=None, gpus=(), fault="no NVIDIA driver was found")
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return Driver(cuda=None, gpus=(), fault="the NVIDIA driver does not answer")
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    status, count = library.cuInit(0), ctypes.c_int()
    if status == 0:
        status = library.cuDeviceGetCount(ctypes.byref(count))
    if status != 0 or count.value == 0:
        fault = "the driver finds no GPU" + (f" (CUDA error {status})" if status else "")
        return Driver(cuda=cuda, gpus=(), fault=fault)
    return Driver(cuda=cuda, gpus=tuple(_gpu(library, index) for index in range(count.value)))


def _load() -> Any:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _gpu(library: Any, index: int) -> Gpu:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    major, minor = ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_LENGTH)
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, _NAME_LENGTH, device)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    library.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    library.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=10 * major.value + minor.value,
        memory=memory.value,
    )
