"""Results on stdout, everything else on stderr, and no bars in logs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

import admtrt
from admtrt import console
from admtrt.cli import run
from admtrt.console import Output, progress_bar, table
from admtrt.errors import UserError


def test_machines_get_exactly_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(json=True)
    output.note("on the way")
    output.result({"a": 1, "text": "line\nbreak é"}, "for people", table("t", ["c"], [["x"]]))
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": 1, "text": "line\nbreak é"}
    assert out.count("\n") == 1
    assert "for people" not in out + err
    assert err == "on the way\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_streams_that_were_closed(closed: str) -> None:
    """The next opened file must not get their descriptors: the text would be written into a bundle's file."""
    command = f"exec {sys.executable} -m admtrt doctor --json {closed}"
    environment = os.environ | {"PYTHONPATH": str(Path(admtrt.__file__).parents[1])}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert (done.stdout == "") == (closed != "2>&-")


def test_people_get_tables_and_texts(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["first", "1"], ["second", "2\n3"]]
    Output().result({"a": 1}, table("the title", ["name", "value"], rows), "and a text")
    out, err = capsys.readouterr()
    assert [word for word in out.split() if word != "─" * len(word)] == (
        ["the", "title", "name", "value", "first", "1", "second", "2", "3", "and", "a", "text"]
    )
    assert '"a"' not in out
    assert err == ""


def test_a_value_that_json_lacks_is_no_document() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        Output(json=True).result({"loss": float("nan")})


def test_names_and_paths_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = "/folder [bold]/no markup[/bold] :smile: [0, 1] " + "long/" * 30
    Output().note(text)
    Output().result({}, text, table("[x] :cat:", ["[y]"], [["[z] :dog:"]]))
    out, err = capsys.readouterr()
    assert err == f"{text}\n"
    assert out.startswith(f"{text}\n")
    assert all(part in out for part in ("[x] :cat:", "[y]", "[z] :dog:"))


def test_a_cell_may_have_a_style(capsys: pytest.CaptureFixture[str]) -> None:
    Output().result({}, table("t", ["c"], [[Text("FAIL", style="bold red")]]))
    assert capsys.readouterr().out.split()[-1] == "FAIL"


def test_wide_tables_are_folded_and_nothing_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    long = "abcdefghij" * 20
    Output().result({}, table("t", ["name", "value"], [["key", long]]))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert sum(shown.count(letter) for letter in "abcdefghij") >= len(long)


def test_a_log_in_colour_holds_no_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar("sampling", 10) as progress:
        progress(1, "step 1")
    assert capsys.readouterr() == ("", "")


def test_logs_hold_no_bars(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("sampling", 10) as progress:
        for step in range(10):
            progress(1, f"step {step}")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_what_is_done_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(console, "_console", lambda *, stderr: terminal)
    with progress_bar("sampling", 10, done=4) as progress:
        progress(3, "step 2/5")
    shown = screen.getvalue()
    assert "sampling" in shown
    assert "7/10" in shown
    assert "step 2/5" in shown
    assert "ETA" in shown


def test_an_interrupted_block_ends_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "_console", lambda *, stderr: Console(file=screen, force_terminal=True))
    with pytest.raises(KeyboardInterrupt), progress_bar("sampling", 10):
        raise KeyboardInterrupt
    assert screen.getvalue().endswith("\x1b[?25h")  # the cursor is back


# --- what comes from elsewhere ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["x" * 200_000, "x y " * 50_000, "x\n" * 100_000])
def test_a_long_value_buries_no_message(value: str) -> None:
    error = UserError(f"the value {value} is too long", hint=f"Leave {value} out.")
    assert error.message.startswith("the value x")
    assert error.message.endswith("is too long")
    assert " characters]" in error.message
    assert len(str(error)) < 10_000


def test_a_path_of_any_depth_is_shown_whole() -> None:
    path = "/folder" * 140
    assert UserError(f"{path} does not exist").message == f"{path} does not exist"


def test_names_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Nor can texts from a refused file."""
    Output().note("before\x1b[2J\r\x9b1mafter é\n")
    assert capsys.readouterr().err == "before\\x1b[2J\\r\\x9b1mafter é\n\n"
    assert run(["inspect", "\x1b]0;title\x07"]) == 2
    assert capsys.readouterr().err.startswith("error: \\x1b]0;title\\x07 does not exist\n")
