"""The documentation agrees with the code: the generated reference, links and named options."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import admtrt
from admtrt.run_config import RunConfig
from admtrt.schedule.options import OPTIONS
from admtrt.schedule.solvers import SOLVERS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def test_cli_reference_is_current(tmp_path: Path) -> None:
    """`make docs` writes it."""
    made = tmp_path / "cli.md"
    arguments = ["typer", "admtrt.cli", "utils", "docs", "--name", "admtrt", "--output", str(made)]
    subprocess.run([sys.executable, "-m", *arguments], check=True, cwd=ROOT, capture_output=True)
    assert made.read_text() == (ROOT / "docs" / "cli.md").read_text(), "run `make docs`"


def test_configuration_reference_is_current(tmp_path: Path) -> None:
    """`make docs` writes it."""
    made = tmp_path / "configuration.md"
    subprocess.run([sys.executable, ROOT / "tools" / "configuration_page.py", made], check=True, cwd=ROOT)
    assert made.read_text() == (ROOT / "docs" / "configuration.md").read_text(), "run `make docs`"
    for name in RunConfig.model_fields:
        assert f"\n## [{name}]" in made.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_commands_in_the_documentation_exist() -> None:
    """Every `admtrt COMMAND --option` on a page is in the reference."""
    reference = (ROOT / "docs" / "cli.md").read_text()
    commands = set(re.findall(r"^## `admtrt (\w+)`|^### `admtrt (\w+ \w+)`", reference, re.MULTILINE))
    names = {first or second for first, second in commands}
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"^(?:\$ )?admtrt (\w.*)$", text, re.MULTILINE):
            words = line.split()
            assert words[0] in names, f"{page.name}: admtrt {line}"
            for option in re.findall(r"(?<=\s)--[a-z][a-z-]*", line):
                known = re.search(rf"`(?:-\w, )?{option}", reference) or f"/{option}" in reference
                assert known, f"{page.name}: {option} in: {line}"


def test_every_solver_and_option_stands_on_its_page() -> None:
    page = (ROOT / "docs" / "solvers.md").read_text()
    for name in SOLVERS:
        assert re.search(rf"^\|[^|]*`{name}`", page, re.MULTILINE), name
    for name in OPTIONS:
        assert f"`{name}`" in page, name


def test_every_public_name_stands_in_the_reference() -> None:
    """`make site` takes the rest of it from the docstrings."""
    page = (ROOT / "docs" / "site" / "reference.rst").read_text()
    named = set(re.findall(r"^\.\. auto(?:class|function):: admtrt\.(\w+)$", page, re.MULTILINE))
    assert named == set(admtrt.__all__) - {"__version__"}
