"""Which inference library is found, and that it has every member that the builder uses."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import types
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import pytest
from rtx import NEEDS_RTX

from admtrt.errors import EngineError, MissingDependencyError
from admtrt.runtime.engines import builder, faults
from admtrt.runtime.engines.library import (
    USED_TO_BUILD,
    USED_TO_BUILD_RTX,
    Flavor,
    choose_library,
    find_libraries,
    find_library,
    lean_runtime,
)

NAMES = ("tensorrt", "tensorrt_bindings", "tensorrt_rtx", "tensorrt_rtx_bindings")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes exactly the given modules importable, with a version each."""

    def install(**versions: str) -> None:
        for name in NAMES:
            monkeypatch.delitem(sys.modules, name, raising=False)
            module = types.ModuleType(name)
            module.__version__ = versions.get(name)  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, name, module if name in versions else None)  # type: ignore[arg-type]

    return install


@pytest.fixture(autouse=True)
def _absent_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """For an entry None in sys.modules the error has no name; the real import error has one."""
    import importlib

    real = importlib.import_module

    def import_module(name: str) -> Any:
        if name in sys.modules and sys.modules[name] is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", import_module)


@pytest.mark.parametrize("flavor", ["tensorrt", "rtx"])
def test_an_absent_library_is_named_with_the_command_that_installs_it(installed: Any, flavor: Flavor) -> None:
    installed()
    with pytest.raises(MissingDependencyError, match=rf"pip install .*\[{flavor}\]'"):
        find_library(flavor)


@pytest.mark.parametrize(
    ("flavor", "module", "version", "name"),
    [
        ("tensorrt", "tensorrt", "10.13.0.35", "TensorRT 10.13.0.35"),
        ("tensorrt", "tensorrt", "11.4.0.106", "TensorRT 11.4.0.106"),
        ("tensorrt", "tensorrt_bindings", "11.0.0", "TensorRT 11.0.0"),
        ("rtx", "tensorrt_rtx", "1.7.1.116", "TensorRT-RTX 1.7.1.116"),
        ("rtx", "tensorrt_rtx_bindings", "1.10.0", "TensorRT-RTX 1.10.0"),
    ],
)
def test_both_libraries_and_their_bare_bindings_are_found(
    installed: Any, flavor: Flavor, module: str, version: str, name: str
) -> None:
    installed(**{module: version})
    library = find_library(flavor)
    assert (str(library), library.module.__name__, library.targets) == (name, module, ())


@pytest.mark.parametrize(
    ("flavor", "module", "version"),
    [("tensorrt", "tensorrt", "10.11.9"), ("tensorrt", "tensorrt", "9.99"), ("rtx", "tensorrt_rtx", "1.6.2"),
     ("tensorrt", "tensorrt", "unknown")],
)  # fmt: skip
def test_an_old_library_is_refused(installed: Any, flavor: Flavor, module: str, version: str) -> None:
    installed(**{module: version})
    with pytest.raises(EngineError, match=rf"{version} is too old; admtrt needs 1.* or later\nUpgrade it"):
        find_library(flavor)


@pytest.mark.parametrize(
    "fault", [OSError("libnvinfer.so.11: cannot open"), ModuleNotFoundError("No libs", name="tensorrt_libs")]
)
def test_a_broken_installation_is_told_from_an_absent_one(
    monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def broken(name: str) -> None:
        raise fault

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(
        EngineError, match=r"TensorRT is installed but cannot be loaded: .*\nInstall it again"
    ):
        find_library("tensorrt")


def test_without_a_choice_a_gpu_decides(installed: Any) -> None:
    installed(tensorrt="11.4.0", tensorrt_rtx="1.7.1")
    assert choose_library(gpu=True).flavor == "tensorrt"
    assert choose_library(gpu=False).flavor == "rtx"
    installed(tensorrt_rtx="1.7.1")
    assert choose_library(gpu=True).flavor == "rtx"
    installed(tensorrt="11.4.0")
    with pytest.raises(MissingDependencyError, match="TensorRT-RTX"):
        choose_library(gpu=False)


def test_a_library_that_cannot_be_used_does_not_hide_the_other(installed: Any) -> None:
    installed(tensorrt="10.8.0", tensorrt_rtx="1.7.1")
    assert choose_library(gpu=True).flavor == "rtx"
    assert [library.flavor for library in find_libraries()] == ["rtx"]
    installed(tensorrt="10.8.0")
    with pytest.raises(EngineError, match=r"10\.8\.0 is too old"):
        find_libraries()
    installed()
    with pytest.raises(MissingDependencyError, match="TensorRT engines"):
        find_libraries()


@pytest.mark.skipif(find_spec("tensorrt_lean_libs") is None, reason="tensorrt_lean is not installed")
def test_the_lean_runtime_of_a_version() -> None:
    found = lean_runtime(version("tensorrt_lean_cu13_libs"))
    assert found is not None
    assert found.is_file()
    assert lean_runtime("1.2.3") is None


@NEEDS_RTX
@pytest.mark.parametrize("name", [*USED_TO_BUILD, *USED_TO_BUILD_RTX])
def test_the_real_library_has_every_member_that_is_used(name: str) -> None:
    found: Any = find_library("rtx").module
    for part in name.split("."):
        assert hasattr(found, part), f"{name}: no {part}"
        found = getattr(found, part)


def test_no_member_is_used_that_is_not_listed() -> None:
    """The attributes of the library's objects that the builder uses, read from its source."""
    objects = {"trt", "config", "rtx", "builder", "network", "parser", "shapes", "error", "plan", "cache"}
    listed = {part for name in (*USED_TO_BUILD, *USED_TO_BUILD_RTX) for part in name.split(".")}
    used = set()
    for node in ast.walk(ast.parse(inspect.getsource(builder))):
        if isinstance(node, ast.Attribute):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in objects:
                used.add(node.attr)
    assert {"parse_from_file", "WORKSPACE", "set_compute_capability"} <= used
    assert used - {"__init__"} <= listed
    source = inspect.getsource(builder) + inspect.getsource(faults)
    members = {name.rpartition(".")[2] for name in (*USED_TO_BUILD, *USED_TO_BUILD_RTX)}
    assert {name for name in members if name.islower() and not re.search(rf"\b{name}\b", source)} == set()


@NEEDS_RTX
def test_the_targets_come_from_the_library() -> None:
    targets = find_library("rtx").targets
    assert {75, 80, 86, 89, 120} <= set(targets)
    assert 90 not in targets
