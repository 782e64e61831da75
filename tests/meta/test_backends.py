"""A backend is declared in its own file: no other code distinguishes backends by name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import admtrt
from admtrt.bench.machine import describe_machine
from admtrt.cli import run
from admtrt.errors import RequestError
from admtrt.runtime.backends import registry
from admtrt.runtime.backends.backend import Backend
from admtrt.runtime.backends.choice import BackendChoice
from admtrt.runtime.backends.registry import BACKENDS

PACKAGE = Path(admtrt.__file__).parent
FILES = {Path(file.__file__) for file in registry.FILES}
LIBRARIES = ("flavor", "library")
"""Attributes that hold a library of engines, one of which is called like a backend."""


def compared(node: ast.AST) -> list[str]:
    """The names of backends that a comparison or a case has."""
    parts: list[ast.expr] = []
    if isinstance(node, ast.Compare):
        parts = [node.left, *node.comparators]
    elif isinstance(node, ast.MatchValue):
        parts = [node.value]
    if any(isinstance(part, ast.Attribute) and part.attr in LIBRARIES for part in parts):
        return []
    inner = [
        each
        for part in parts
        for each in (part.elts if isinstance(part, ast.Tuple | ast.List | ast.Set) else [part])
    ]
    return [each.value for each in inner if isinstance(each, ast.Constant) and each.value in BACKENDS]


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("name == 'openvino'", ["openvino"]),
        ("name in ('onnxruntime', 'x')", ["onnxruntime"]),
        ("library.flavor == 'tensorrt'", []),
        ("backend = 'onnxruntime'", []),
    ],
)
def test_comparisons_are_found(source: str, names: list[str]) -> None:
    assert [name for node in ast.walk(ast.parse(source)) for name in compared(node)] == names


def test_no_name_of_a_backend_is_compared_outside_its_file() -> None:
    found = [
        f"{source.relative_to(PACKAGE)}:{node.lineno} {name}"
        for source in sorted(PACKAGE.rglob("*.py"))
        if source not in FILES
        for node in ast.walk(ast.parse(source.read_text()))
        for name in compared(node)
        if isinstance(node, ast.expr | ast.MatchValue)
    ]
    assert not found


def test_a_new_backend_is_asked_for_by_what_it_declares(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once it is in the table, it can be chosen, its limits are kept, ``doctor`` and ``bench`` show it."""
    new = Backend(
        "abacus",
        "beads on wires",
        ("fp32",),
        "cpu",
        (("numpy",),),
        lambda *_: pytest.fail("opened"),
        ("pytest",),
    )
    monkeypatch.setitem(BACKENDS, new.name, new)
    assert BackendChoice("abacus", threads=2).name == "abacus"
    with pytest.raises(RequestError, match="'abacus' computes in fp32, not in bf16"):
        BackendChoice("abacus", "bf16")
    with pytest.raises(RequestError, match="'abacus' runs no plans"):
        BackendChoice("abacus", plans=Path("plans"))
    assert run(["doctor"]) == 0
    assert "beads on wires" in capsys.readouterr().out
    assert describe_machine(1, None)["versions"]["pytest"] == pytest.__version__
