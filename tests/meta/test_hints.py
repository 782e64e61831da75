"""Advice can be followed where it is printed: the command lines in texts of the package exist."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main

import admtrt
from admtrt import installing
from admtrt.cli import app
from admtrt.errors import MissingDependencyError

PACKAGE = Path(admtrt.__file__).parent
ROOT = PACKAGE.parent
UsageError = typer.BadParameter.__mro__[1]  # of the parser within typer
SOURCES = sorted(PACKAGE.rglob("*.py"))
MARKED = re.compile(r"(?:: |`|\()(admtrt|make|pip|python) ([^`;)\n]+?)(?=[`;)]|[,.](?:\s|$)|$)")
"""Text in backquotes or brackets, or behind a colon, is to be typed."""
FILLED = {
    "library.flavor": "rtx",
    "source.precision": "fp16",
    "bundle": "BUNDLE",
    "bundle.path": "BUNDLE",
    "plans": "FOLDER",
    "ISLANDS": "softmax",
}
"""For what a text names by an expression, or in capital letters where any word will not do."""


def texts(source: Path) -> Iterator[str]:
    """The strings of a module that are no docstrings, with the expressions in them between braces."""
    tree = ast.parse(source.read_text())
    silent = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)
    }  # docstrings, and whatever else is thrown away
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in silent | inner:
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
                for part in node.values
                if isinstance(part, ast.Constant | ast.FormattedValue)
                and (not isinstance(part, ast.Constant) or isinstance(part.value, str))
            )  # fmt: skip
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def command_lines() -> list[tuple[str, str, str]]:
    """(file, program, arguments) of every command line that a hint tells users to type."""
    return [
        (str(source.relative_to(ROOT)), *found)
        for source in SOURCES
        for text in texts(source)
        for found in MARKED.findall(text)
    ]


def filled(line: str) -> list[str]:
    """The words of a command line with something in the place of everything that it leaves open."""
    line = re.sub(r"\{([^}]*)\}", lambda found: FILLED[found[1]], line)
    return [FILLED.get(word, word) for word in shlex.split(line)]


def commands(group: Any, name: str = "") -> dict[str, Any]:
    """Every command by its words."""
    if not hasattr(group, "commands"):
        return {name: group}
    each = (commands(command, f"{name} {word}".strip()) for word, command in group.commands.items())
    return {words: command for found in each for words, command in found.items()}


COMMANDS = commands(typer.main.get_command(app))


def parse(words: list[str]) -> None:
    """Parse the words of one command line as the command line would, without doing anything."""
    length = next((count for count in (1, 2) if " ".join(words[:count]) in COMMANDS), 3)
    COMMANDS[" ".join(words[:length])].make_context(words[length - 1], words[length:])


LINES = command_lines()


def test_command_lines_are_found() -> None:
    """The search works: these are known to be there."""
    found = {line for _, program, line in LINES if program == "admtrt"}
    assert {"doctor", "build BUNDLE --batch 1:4:16", "export UNET --out BUNDLE"} <= found
    assert len(found) > 8


@pytest.mark.parametrize("line", ["build --library rtx", "build BUNDLE --fast", "fly BUNDLE", "train VERB"])
def test_lines_that_do_not_exist_are_refused(line: str) -> None:
    with pytest.raises((KeyError, UsageError)):
        parse(filled(line))


@pytest.mark.parametrize(("where", "program", "line"), LINES)
def test_every_command_line_can_be_typed(where: str, program: str, line: str) -> None:
    if program == "make":
        assert re.search(rf"^{line.split()[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), where
        return
    assert program == "admtrt", f"{where}: lines of pip are made by admtrt.installing"
    parse(filled(line))


def test_nothing_else_speaks_of_pip() -> None:
    """Also, no hint tells users to uninstall a package before its replacement is installed."""
    for source in SOURCES:
        for text in texts(source):
            assert "pip install" not in text, source
            assert "uninstall" not in text, source


def test_options_that_texts_name_exist() -> None:
    known = {
        option
        for command in COMMANDS.values()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    known |= {"--help", "--version", "--force-reinstall", "--upgrade"}  # the last two are pip's
    known |= {"--cache"}  # the former name of --plans
    known |= {"--model-repository"}  # tritonserver's
    for source in SOURCES:
        for text in texts(source):
            named = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w-])", text)
            assert set(named) <= known, source


def extras_named() -> Iterator[tuple[Path, str]]:
    """Values of the argument ``extra`` in calls, including fields of tables."""
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                given = [word.value for word in node.keywords if word.arg == "extra"]
                given += node.args[:1] if name == "install_extra" else []
                given += node.args[1:2] if name == "Provider" else []
                given += node.args[3:4] if name == "Backend" else []
                for value in given:
                    if isinstance(value, ast.Constant) and name != "ConfigDict":
                        yield source, value.value


def test_extras_that_are_named_exist() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = list(extras_named())
    assert {"cpu", "train", "export", "plot", "openvino", "ort-rtx", "tensorrt or rtx"} <= {
        e for _, e in named
    }
    for source, extra in named:
        assert set(extra.split(" or ")) <= set(known), source


def test_an_extra_comes_from_the_checkout() -> None:
    """The name is on no package index: anyone could register another package under it."""
    for error in (
        MissingDependencyError("x", extra="rtx", purpose="this"),
        MissingDependencyError("x", extra="tensorrt or rtx", purpose="this"),
    ):
        assert f"install -e '{ROOT}[rtx]'" in error.hint
        assert "admtrt[" not in error.hint.replace(f"{ROOT}[", "")


@pytest.mark.parametrize("place", ["/home/me/the checkout", None])
def test_an_extra_of_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str | None
) -> None:
    """An installed copy names its original source, while that exists."""
    monkeypatch.setattr(installing, "__file__", str(tmp_path / "site-packages" / "admtrt" / "installing.py"))
    here = tmp_path / "a checkout"

    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            url = here.as_uri() if place else (tmp_path / "gone").as_uri()
            return f'{{"url": "{url}", "dir_info": {{}}}}'

    here.mkdir()
    monkeypatch.setattr("importlib.metadata.distribution", lambda _: Installed())
    made = installing.install_extra("cpu")
    if place:
        assert made.endswith(f"install '{here}[cpu]'")
    else:
        assert made.endswith("install '.[cpu]', in a checkout of admtrt")


@pytest.mark.slow
def test_the_command_that_installs_an_extra_works() -> None:
    """The command without its downloads."""
    made = shlex.split(installing.install_extra("cpu"))
    pip = made[: made.index("install")]
    if pip == ["pip"]:
        pip = [sys.executable, "-m", "pip"]
    options = ["--dry-run", "--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    subprocess.run([*pip, *made[made.index("install") :], *options], check=True, capture_output=True)
