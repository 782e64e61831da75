"""CONTRIBUTING's recipes: every file and name in them is there, and the examples work."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from admtrt.cli import app
from admtrt.export.guides.named import BUILT_INS
from admtrt.export.vjp import RULES
from admtrt.models import checkpoint
from admtrt.runtime.backends import registry
from admtrt.schedule.solvers import SOLVERS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "CONTRIBUTING.md"
RECIPES = dict(
    section.split("\n", 1) for section in PAGE.read_text().split("\n# How to add ...\n")[1].split("\n## ")[1:]
)
FILE = re.compile(
    r"`((?:admtrt|docs|tests|tools|configs)/[\w./-]*|NOTICE|[A-Z]+\.md|[\w-]+\.(?:toml|txt|md))`"
)
NAME = re.compile(r"`(\w+)`(?: and `(\w+)`)?(?: of `\w+`)? in `(admtrt/[\w/]+\.py)`")


def steps(recipe: str) -> str:
    """A recipe's text without its example."""
    return re.sub(r"```python\n.*?```", "", recipe, flags=re.DOTALL)


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Undo what examples register, and run them in a temporary folder."""
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))
    monkeypatch.setattr(checkpoint, "READERS", checkpoint.READERS)
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as restored:
        for table in (SOLVERS, RULES, registry.BACKENDS, BUILT_INS):
            restored.enter_context(patch.dict(table))
        yield


def test_every_kind_has_a_recipe() -> None:
    asked = (
        "solver",
        "gradient rule",
        "backend",
        "command",
        "kind of data",
        "model family",
        "guide",
        "metric",
    )
    assert {f"A {kind}" for kind in asked} | {"A checkpoint's reader"} <= RECIPES.keys()


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_names_files_its_test_and_its_page(title: str) -> None:
    text = steps(RECIPES[title])
    files = FILE.findall(text)
    assert [file for file in files if not (ROOT / file).exists()] == []
    assert re.search(r"^1\. ", text, re.MULTILINE)
    assert "\nTest: " in text
    assert re.search(r"\bPage:\s", text)
    assert any(file.startswith("tests/") for file in files)
    assert any(file.startswith("docs/") for file in files)


@pytest.mark.parametrize("title", RECIPES)
def test_names_in_a_recipe_stand_in_their_files(title: str) -> None:
    for *names, file in NAME.findall(steps(RECIPES[title])):
        text = (ROOT / file).read_text()
        assert [name for name in names if name and not re.search(rf"\b{name}\b", text)] == [], file


@pytest.mark.parametrize("title", RECIPES)
@pytest.mark.usefixtures("registries")
def test_an_example_works(title: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", RECIPES[title], re.DOTALL)
    assert "assert" in code or "check_loss" in code
    exec(compile(code, f"{PAGE.name}: {title}", "exec", dont_inherit=True), {"__name__": "example"})
