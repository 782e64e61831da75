"""Where something was measured."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import admtrt

if TYPE_CHECKING:
    from collections.abc import Mapping

_PACKAGES = (
    "numpy", "torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt",
    "tensorrt-rtx-cu13",
)  # fmt: skip


def available_threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(threads: int, gpu: str | None) -> dict[str, Any]:
    """Processor, threads, memory, the GPU that was used, and versions of what is installed."""
    versions = {"admtrt": admtrt.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "processors": available_threads(),
        "threads": threads,
        "memory": memory,
        "gpu": gpu,
        "system": platform.platform(),
        "versions": versions,
    }


def machine_lines(machine: Mapping[str, Any]) -> list[str]:
    """What :func:`describe_machine` found, for people."""
    cores = f"{machine['threads']} threads on {machine['processors']} processors"
    device = [] if machine["gpu"] is None else [machine["gpu"]]
    parts = [*device, machine["processor"], cores, f"{machine['memory'] / 2**30:.0f} GiB", machine["system"]]
    return [", ".join(parts), ", ".join(f"{name} {found}" for name, found in machine["versions"].items())]


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
