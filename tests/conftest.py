"""Shared test setup: one torch thread a process, versions in the header, GPU tests skipped with a reason."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

# Workers share few cores, and the results of one thread do not depend on the machine.
torch.set_num_threads(1)


def pytest_report_header() -> str:
    names = ("torch", "onnx", "onnxscript", "onnxruntime", "tensorrt_rtx_cu13", "numpy")
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)
