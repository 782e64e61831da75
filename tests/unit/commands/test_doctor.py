# ruff: noqa: N802 - the names of the driver's functions
"""``admtrt doctor``: what is installed, what is missing, and the consequences; never an error."""

from __future__ import annotations

import ctypes
import json
import re
import types
from typing import Any

import pytest

from admtrt.cli import run
from admtrt.commands import doctor
from admtrt.installing import install_extra, pip_install
from admtrt.runtime.backends.backend import Availability, Backend
from admtrt.runtime.backends.registry import BACKENDS
from admtrt.runtime.engines import device
from admtrt.runtime.engines.device import Driver, Gpu, query_driver

ADA = Gpu(name="NVIDIA L4", compute_capability=89, memory=24 * 2**30)
HOPPER = Gpu(name="NVIDIA H100", compute_capability=90, memory=80 * 2**30)
NO_DRIVER = Driver(cuda=None, gpus=(), fault="no NVIDIA driver was found")


def with_gpu(gpu: Gpu) -> Driver:
    return Driver(cuda="13.0", gpus=(gpu,))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes exactly the given packages importable, each with some version."""

    def install(*names: str) -> None:
        modules = {name: types.SimpleNamespace(__version__="11.4.0-commit") for name in names}
        if "tensorrt_rtx" in modules:
            members = {"SM80": 1, "SM89": 2}
            modules["tensorrt_rtx"].ComputeCapability = types.SimpleNamespace(__members__=members)

        def import_module(name: str) -> Any:
            if name not in modules:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return modules[name]

        monkeypatch.setattr("importlib.import_module", import_module)

    return install


def examined(driver: Driver) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine(driver)}


EXTRAS = {"TensorRT": "tensorrt", "TensorRT-RTX": "rtx", "ONNX Runtime": "cpu", "OpenVINO": "openvino"}


def test_what_is_missing_comes_with_a_hint(installed: Any) -> None:
    installed()
    findings = examined(NO_DRIVER)
    for name in EXTRAS:
        assert not findings[name].found
        assert findings[name].hint == f"Install it with: {install_extra(EXTRAS[name])}"
        assert (findings[name].builds, findings[name].runs_plans) == ("", False)
    # The extra "cuda" would put another build of ONNX Runtime over the one of "cpu".
    assert findings["cuda-core"].hint == f"Install it with: {pip_install('cuda-core', 'cuda-bindings')}"
    assert findings["TensorRT lean"].hint == f"Install it with: {pip_install('tensorrt-lean-cu13')}"
    assert "run only with it" in findings["NVIDIA driver"].hint


TARGETS = "builds plans for SM80, SM89; "


@pytest.mark.parametrize(
    ("name", "driver", "builds", "runs", "detail"),
    [
        ("TensorRT", NO_DRIVER, "", False, "builds none; runs none without a GPU"),
        ("TensorRT", with_gpu(ADA), "tensorrt", True, "builds plans; runs plans"),
        ("TensorRT", with_gpu(HOPPER), "tensorrt", True, "builds plans; runs plans"),
        ("TensorRT-RTX", NO_DRIVER, "rtx", False, TARGETS + "runs none without a GPU"),
        ("TensorRT-RTX", with_gpu(ADA), "rtx", True, TARGETS + "runs plans"),
        ("TensorRT-RTX", with_gpu(HOPPER), "rtx", False, TARGETS + "runs none on NVIDIA H100 (SM90)"),
    ],
)
def test_what_each_library_does_here(
    installed: Any, name: str, driver: Driver, builds: str, runs: bool, detail: str
) -> None:
    installed("tensorrt", "tensorrt_rtx", "openvino")
    findings = examined(driver)
    found = findings[name]
    assert (found.builds, found.runs_plans, found.detail) == (builds, runs, detail)
    assert findings["OpenVINO"].version == "11.4.0"
    assert ("GPU 0" in findings) == (driver.gpu is not None)


def test_a_library_that_cannot_be_loaded_is_told_from_an_absent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError(f"lib{name}.so: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", broken)
    findings = examined(with_gpu(ADA))
    for name in ("TensorRT", "cuda-core", "ONNX Runtime"):
        assert not findings[name].found
        assert "cannot be loaded" in findings[name].detail
        assert "cannot open shared object file" in findings[name].detail


@pytest.mark.parametrize("runs_plans", [True, False])
def test_the_backend_of_the_plans_needs_a_library_that_runs_them(
    monkeypatch: pytest.MonkeyPatch, runs_plans: bool
) -> None:
    monkeypatch.setattr(Backend, "available", lambda self: Availability())
    found = doctor.Finding("TensorRT-RTX", found=True, runs_plans=runs_plans)
    abilities = {ability.name: ability for ability in doctor.backends([found])}
    assert set(abilities) == set(BACKENDS)
    assert {name for name, ability in abilities.items() if not ability.runs} == (
        set() if runs_plans else {"tensorrt"}
    )
    assert ("on this GPU" in abilities["tensorrt"].detail) != runs_plans


@pytest.mark.parametrize("capable", [True, False])
def test_precisions_are_those_of_this_processor(monkeypatch: pytest.MonkeyPatch, capable: bool) -> None:
    monkeypatch.setattr(Backend, "available", lambda self: Availability())
    monkeypatch.setattr("admtrt.runtime.backends.openvino.computes_bf16", lambda: capable)
    (openvino,) = (ability for ability in doctor.backends([]) if ability.name == "openvino")
    assert openvino.precisions == (("fp32", "bf16") if capable else ("fp32",))


def test_a_backend_that_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise RuntimeError("libopenvino.so: cannot open shared object file")

    monkeypatch.setattr(Backend, "available", lambda self: Availability())
    monkeypatch.setattr("admtrt.runtime.backends.openvino.computes_bf16", broken)
    (openvino,) = (ability for ability in doctor.backends([]) if ability.name == "openvino")
    assert not openvino.runs
    assert "cannot open shared object file" in openvino.detail


def test_a_backend_that_does_not_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backend, "available", lambda self: Availability("lacks a thing", "get the thing"))
    for ability in doctor.backends([]):
        assert (ability.runs, ability.detail, ability.hint) == (False, "lacks a thing", "get the thing")


def test_the_real_machine_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {"NVIDIA driver", "ONNX Runtime", "PyTorch"} <= {finding["name"] for finding in shown["findings"]}
    runs = {backend["name"]: backend["runs"] for backend in shown["backends"]}
    assert runs["onnxruntime"]
    assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("TensorRT-RTX", "cuda-core", "OpenVINO", *BACKENDS))
    assert "\nHere you can sample with onnxruntime" in text
    assert text.count("no NVIDIA driver was found") <= 1


def test_the_last_lines_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [
        doctor.Finding("TensorRT-RTX", found=True, builds="rtx"),
        doctor.Finding("NVIDIA driver", found=False, detail="no driver"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda _: findings)
    monkeypatch.setattr(
        Backend, "available", lambda self: Availability("" if self.device == "cpu" else "it lacks: no driver")
    )
    assert run(["doctor"]) == 0
    *_, here, install = capsys.readouterr().out.splitlines()
    assert here == "Here you can sample with onnxruntime, openvino; build plans (rtx)."
    assert install.startswith("Install for a data-centre GPU (H100, A100): ")
    assert install.endswith("[tensorrt]'")


# --- the driver -----------------------------------------------------------------------------------------


def _pointed(reference: Any) -> Any:
    return reference._obj  # noqa: SLF001 - ctypes has no other name for what byref was given


class FakeCuda:
    """The driver's C functions: two GPUs, or the status that each call is told to return."""

    def __init__(self, **statuses: int) -> None:
        self.statuses = statuses

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.statuses.get(name, 0) or getattr(self, f"_{name}")(*arguments) or 0

    def _cuInit(self, flags: int) -> None:
        assert flags == 0

    def _cuDriverGetVersion(self, version: Any) -> None:
        _pointed(version).value = 13020

    def _cuDeviceGetCount(self, count: Any) -> None:
        _pointed(count).value = 2

    def _cuDeviceGet(self, device: Any, index: int) -> None:
        _pointed(device).value = 10 + index

    def _cuDeviceGetName(self, name: Any, length: int, device: Any) -> None:
        assert ctypes.sizeof(name) == length
        name.value = f"GPU of {device.value}".encode()

    def _cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> None:
        _pointed(memory).value = 80 * 2**30

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> None:
        _pointed(value).value = {75: 12, 76: 1}[attribute]


def driven(monkeypatch: pytest.MonkeyPatch, **statuses: int) -> Driver:
    monkeypatch.setattr(device, "_load", lambda: FakeCuda(**statuses))
    return query_driver()


def test_every_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = driven(monkeypatch)
    assert (driver.cuda, driver.fault) == ("13.2", "")
    assert driver.gpus == tuple(Gpu(f"GPU of {10 + index}", 121, 80 * 2**30) for index in range(2))
    assert driver.gpu == driver.gpus[0]
    assert str(driver.gpu) == "GPU of 10 (SM121)"


@pytest.mark.parametrize(
    ("statuses", "cuda", "fault"),
    [
        ({"cuDriverGetVersion": 999}, None, "does not answer"),
        ({"cuInit": 100}, "13.2", r"finds no GPU \(CUDA error 100\)"),
        ({"cuDeviceGetCount": 3}, "13.2", r"finds no GPU \(CUDA error 3\)"),
    ],
)
def test_a_driver_without_a_gpu_is_no_error(
    monkeypatch: pytest.MonkeyPatch, statuses: dict[str, int], cuda: str | None, fault: str
) -> None:
    driver = driven(monkeypatch, **statuses)
    assert (driver.cuda, driver.gpu) == (cuda, None)
    assert re.search(fault, driver.fault)


def test_a_machine_without_a_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert query_driver() == NO_DRIVER
