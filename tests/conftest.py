"""Shared test setup: a uniform environment, one torch thread per process, versions in the header."""

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

# Workers share few cores, and with one thread results do not depend on the machine.
torch.set_num_threads(1)

# Tests compare messages without colours; environment variables of some CIs turn colours on even for files.
for _name in (
    "GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS",
    "TERMINAL_WIDTH",
):  # fmt: skip
    os.environ.pop(_name, None)
os.environ["TERM"] = "xterm"

# In tests that a shell started in the background, SIGINT would be ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests also import the libraries directly.
silence()

# On a busy machine one example takes seconds. Examples share the test's fixtures but do not change them.
settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("tests")

# Cached data (hashes, the fastest backend) must not go into the user's cache folder.
_CACHE = tempfile.TemporaryDirectory(prefix="admtrt-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name


def pytest_configure(config: pytest.Config) -> None:
    """Give the workers of a run one folder, for what each of them would otherwise export anew."""
    if not hasattr(config, "workerinput"):
        shared = tempfile.TemporaryDirectory(prefix="admtrt-tests-")
        config.add_cleanup(shared.cleanup)
        os.environ["ADMTRT_TESTS_SHARED"] = shared.name


@pytest.fixture(autouse=True)
def _no_misuse_of_the_gpu() -> Iterator[None]:
    yield
    stub = sys.modules.get("cuda_stub")
    found = stub.misuses() if stub is not None else []
    assert not found, found


@pytest.fixture(autouse=True)
def _signals_stay_as_they_were(request: pytest.FixtureRequest) -> Iterator[None]:
    """Refuse a signal handler that a test leaves behind: a later test that raises it would end the worker.

    Ray installs its own handler whenever it starts.
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
