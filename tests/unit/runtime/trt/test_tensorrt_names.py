"""Every member that is used exists in the real libraries, and the doubles have none that those lack."""

from __future__ import annotations

import inspect
from functools import reduce
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import engine_double
import pytest

from admtrt.runtime import cuda
from admtrt.runtime.engines.library import logger_of
from admtrt.runtime.trt.engine import USED_TO_INSPECT, USED_TO_REFIT, USED_TO_RUN, USED_TO_RUN_RTX

DOUBLES = {
    "Context": "IExecutionContext",
    "Engine": "ICudaEngine",
    "EngineInspector": "EngineInspector",
    "Runtime": "Runtime",
    "RtxRuntime": "Runtime",
    "RtxRuntimeConfig": "IRuntimeConfig",
    "RuntimeCache": "IRuntimeCache",
}


def real(module: str) -> Any:
    if find_spec(module.split(".", maxsplit=1)[0]) is None:
        pytest.skip(f"{module} is not installed")
    return import_module(module)


def missing(module: Any, names: tuple[str, ...]) -> list[str]:
    def found(name: str) -> bool:
        try:
            reduce(getattr, name.split("."), module)
        except AttributeError:
            return False
        return True

    return [name for name in names if not found(name)]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("tensorrt_rtx", (*USED_TO_RUN, *USED_TO_REFIT, *USED_TO_INSPECT, *USED_TO_RUN_RTX)),
        ("tensorrt_lean", USED_TO_RUN),
        ("cuda.core", cuda.USED),
        ("cuda.bindings.driver", cuda.USED_OF_DRIVER),
    ],
)
def test_what_is_used_exists(module: str, names: tuple[str, ...]) -> None:
    assert missing(real(module), names) == []


def test_a_name_that_is_not_there_is_found_out() -> None:
    assert missing(real("tensorrt_rtx"), ("Runtime.absent", "Absent", "Runtime")) == [
        "Runtime.absent",
        "Absent",
    ]


@pytest.mark.parametrize("double", DOUBLES)
def test_engine_doubles_have_no_more_methods(double: str) -> None:
    theirs = getattr(real("tensorrt_rtx"), DOUBLES[double])
    methods = inspect.getmembers(getattr(engine_double, double), inspect.isfunction)
    ours = {name for name, _ in methods if not name.startswith("_")}
    assert {name for name in ours if not hasattr(theirs, name)} == set()


@pytest.mark.parametrize(
    "name",
    [
        "CudaGraphStrategy", "DataType", "DynamicShapesKernelSpecializationStrategy",
        "EngineInvalidityDiagnostics", "EngineValidity",
        "ExecutionContextAllocationStrategy", "LayerInformationFormat", "TensorIOMode",
    ],
)  # fmt: skip
def test_enums_of_the_double_are_the_real_ones(name: str) -> None:
    theirs = getattr(real("tensorrt_rtx"), name).__members__
    ours = getattr(engine_double, name).__members__
    assert {key: int(value) for key, value in ours.items()} == {key: int(theirs[key]) for key in ours}


def test_the_logger_of_the_real_library_takes_ours() -> None:
    module = real("tensorrt_rtx")
    logger = logger_of(module)
    assert logger_of(module) is logger
    logger.errors.clear()
    logger.log(module.ILogger.WARNING, "quiet")
    logger.log(module.ILogger.ERROR, "two\n  lines")
    logger.log(module.ILogger.INTERNAL_ERROR, "worse")
    assert logger.errors == ["two\n  lines", "worse"]


def test_a_machine_without_a_driver_says_so() -> None:
    from admtrt.errors import EngineError
    from admtrt.runtime.engines.device import query_driver

    real("cuda.core")
    if query_driver().gpu is not None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineError, match="no engine can run here") as info:
        cuda.CudaDevice()
    assert "admtrt doctor" in info.value.hint
