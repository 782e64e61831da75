"""Output of the command line: results on stdout (a table or one JSON document), progress on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console, RenderableType
    from rich.text import Text


class Output:
    """The output of one command.

    Args:
        json: print exactly one JSON document on stdout, and nothing for people.
    """

    def __init__(self, *, json: bool = False) -> None:
        self.json = json

    def result(self, data: dict[str, Any], *shown: RenderableType) -> None:
        """Print the outcome: ``data`` for machines, or ``shown`` for people."""
        if self.json:
            sys.stdout.write(json.dumps(data, allow_nan=False) + "\n")
            sys.stdout.flush()
        else:
            console = _console(stderr=False)
            for item in shown:
                console.print(item, soft_wrap=isinstance(item, str))  # a wrapped path cannot be copied

    def note(self, text: str) -> None:
        """Print one line for people on stderr, in both modes."""
        _console(stderr=True).print(printable(text), highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """Escape control characters, so that names from files cannot control the terminal."""
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode()
        for each in text
    )


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    # A pipe has no width: use 100 columns, unless COLUMNS is set, to keep tables readable in logs. No markup,
    # since names may contain brackets.
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(
        stderr=stderr,
        width=None if terminal or os.environ.get("COLUMNS") else 100,
        markup=False,
        emoji=False,
        force_interactive=terminal,  # colours can be forced without a terminal; progress bars cannot
    )


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> RenderableType:
    """A table for :meth:`Output.result`; a cell may be a ``rich`` text with a style."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, overflow="fold", no_wrap=index == 0)
    for row in rows:
        made.add_row(*row)
    return made


@contextlib.contextmanager
def progress_bar(description: str, total: int, *, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Show a progress bar with elapsed time and ETA on stderr; yields ``progress(count, text)``.

    Nothing is shown without a terminal.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = _console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_interactive) as bars:
        task = bars.add_task(description, total=total, completed=done, text="")

        def progress(count: int, text: str = "") -> None:
            bars.update(task, advance=count, text=text)

        yield progress
