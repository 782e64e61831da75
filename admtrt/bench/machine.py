"""Describe the machine of a measurement."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any

import admtrt
from admtrt.installing import version_of
from admtrt.runtime.backends.registry import BACKENDS
from admtrt.runtime.machine import available_threads, processor

if TYPE_CHECKING:
    from collections.abc import Mapping

_PACKAGES = ("numpy", "torch", "onnx", "onnxscript")
"""Packages to list besides the backends' distributions."""


def describe_machine(threads: int, gpu: str | None) -> dict[str, Any]:
    """Processor, threads, memory, the GPU that was used, and versions of what is installed."""
    versions = {"admtrt": admtrt.__version__, "python": platform.python_version()}
    of_backends = (name for backend in BACKENDS.values() for name in backend.distributions)
    packages = dict.fromkeys((*_PACKAGES, *of_backends))
    versions |= {package: found for package in packages if (found := version_of(package)) is not None}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor(),
        "processors": available_threads(),
        "threads": threads,
        "memory": memory,
        "gpu": gpu,
        "system": platform.platform(),
        "versions": versions,
    }


def machine_lines(machine: Mapping[str, Any]) -> list[str]:
    """Format the result of :func:`describe_machine` for people."""
    cores = f"{machine['threads']} threads on {machine['processors']} processors"
    device = [] if machine["gpu"] is None else [machine["gpu"]]
    parts = [*device, machine["processor"], cores, f"{machine['memory'] / 2**30:.0f} GiB", machine["system"]]
    return [", ".join(parts), ", ".join(f"{name} {found}" for name, found in machine["versions"].items())]
