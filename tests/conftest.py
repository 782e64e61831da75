"""Shared test setup: the same surroundings everywhere, one torch thread a process, versions in the header."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

from admtrt.runtime.backends.quiet import silence

if TYPE_CHECKING:
    from collections.abc import Iterator

# Workers share few cores, and the results of one thread do not depend on the machine.
torch.set_num_threads(1)

# Messages are compared as they are without colours, which some CIs' variables turn on even into a file.
for _name in (
    "GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS",
    "TERMINAL_WIDTH",
):  # fmt: skip
    os.environ.pop(_name, None)
os.environ["TERM"] = "xterm"

# A shell that starts the tests in the background has SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests import the libraries themselves, too.
silence()

# On a busy machine one example takes seconds. Examples share the fixtures of a test, which they leave alone.
settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("tests")

# What the package remembers between runs (hashes, the fastest backend) stays out of the user's cache.
_CACHE = tempfile.TemporaryDirectory(prefix="admtrt-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name


@pytest.fixture(autouse=True)
def _no_misuse_of_the_gpu() -> Iterator[None]:
    yield
    stub = sys.modules.get("cuda_stub")
    found = stub.misuses() if stub is not None else []
    assert not found, found


@pytest.fixture(autouse=True)
def _signals_stay_as_they_were(request: pytest.FixtureRequest) -> Iterator[None]:
    """A handler that a test leaves behind would end the worker when a later test raises that signal.

    Ray installs one of its own whenever it starts.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    if request.node.get_closest_marker("ray") is None:
        assert {number: signal.getsignal(number) for number in before} == before


def pytest_report_header() -> str:
    names = ("torch", "onnx", "onnxscript", "onnxruntime", "tensorrt_rtx_cu13", "numpy")
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)
