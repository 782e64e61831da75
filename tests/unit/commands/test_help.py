"""Help of the command line: panels, short options, examples, completion."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from admtrt.cli import app, run
from admtrt.commands.panels import EXAMPLES, OWN, PANELS, SHORT

Capture = pytest.CaptureFixture[str]
MANY = 10
"""Options that one panel may hold."""


def leaves(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every command by its words."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


COMMANDS = dict(leaves(typer.main.get_command(app)))
OPTIONS = {
    name: [one for one in command.params if one.param_type_name == "option"]
    for name, command in COMMANDS.items()
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_panel_is_long(name: str) -> None:
    """Options of solvers and of images have their own panels, of any length."""
    panels = [option.rich_help_panel for option in OPTIONS[name]]
    assert panels.count(None) <= 6
    assert all(panels.count(panel) <= MANY + 2 for panel in PANELS)


def test_every_name_in_the_tables_is_an_option() -> None:
    every = {option.name for options in OPTIONS.values() for option in options}
    assert {name for names in PANELS.values() for name in names} <= every
    assert SHORT.keys() <= every
    assert {name for panels in OWN.values() for names in panels.values() for name in names} <= every
    assert OWN.keys() <= {name.split()[-1] for name in COMMANDS}
    assert EXAMPLES.keys() <= {name.split()[-1] for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_short_options_mean_one_thing(name: str) -> None:
    given = [text for option in OPTIONS[name] for text in option.opts]
    assert len(given) == len(set(given))
    assert "-h" not in given


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_examples_are_command_lines(line: str) -> None:
    _, *words = shlex.split(line)
    name = max((name for name in COMMANDS if " ".join(words).startswith(f"{name} ")), key=len)
    COMMANDS[name].make_context(name, words[len(name.split()) :])


@pytest.mark.parametrize("given", [["-h"], ["sample", "-h"], ["evaluate", "samples", "-h"], ["train", "-h"]])
def test_h_is_help(given: list[str], capsys: Capture) -> None:
    assert run(given) == 0
    assert "Usage: admtrt" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["evaluate"], ["evaluate", "features"], ["train"], ["train", "unet"]])
def test_no_type_stands_beside_a_flag(words: list[str], capsys: Capture) -> None:
    assert run([*words, "--help"]) == 0
    assert "<bool>" not in capsys.readouterr().out


def test_help_of_a_command(capsys: Capture) -> None:
    assert run(["sample", "--help"]) == 0
    shown = capsys.readouterr().out
    for panel in ("Options", "What", "Sampler", "Second stage", "Where it runs"):
        assert f"─ {panel} ─" in shown
    assert "Examples:" in shown
    assert "<bool>" not in shown


def test_a_short_option_is_the_long_one(capsys: Capture) -> None:
    said = {}
    for option in ("-o", "--out"):
        assert run(["sample", "nowhere.bundle", option, "x", "-n", "3"]) == 2
        said[option] = capsys.readouterr().err
    assert said["-o"] == said["--out"]


def test_the_shell_completes() -> None:
    words = {"COMP_WORDS": "admtrt sample --upsample-s", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "admtrt"],
        env=os.environ | words | {"_ADMTRT_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["--upsample-steps", "--upsample-scale"]


def test_lists_in_help_are_those_of_the_tables() -> None:
    from admtrt.evaluate.extract import BACKENDS as FOR_FEATURES
    from admtrt.export.guides.named import BUILT_INS
    from admtrt.runtime.backends.registry import BACKENDS

    said = {(name, option.name): option.help for name, options in OPTIONS.items() for option in options}
    assert f"{', '.join(BACKENDS)}; auto" in said["sample", "backend"]
    assert f"{', '.join(FOR_FEATURES)}, or auto" in said["evaluate samples", "backend"]
    assert f"{', '.join(FOR_FEATURES)} or auto" in said["evaluate sweep", "features_backend"]
    assert all(re.search(rf"[:,] {name}\b", said["export", "guide"]) for name in BUILT_INS)
