"""The command line ``admtrt``: assembles the commands and turns errors into messages and exit codes.

Exit codes: 0 done, 1 a check failed, 2 the user's input or request, 3 and 4 a verification that could not
be built or run, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from admtrt import __version__
from admtrt.commands.bench import bench
from admtrt.commands.build import build
from admtrt.commands.configure import configure
from admtrt.commands.convert import convert
from admtrt.commands.demo import demo
from admtrt.commands.doctor import doctor
from admtrt.commands.drift import drift
from admtrt.commands.evaluate import evaluate_app
from admtrt.commands.export import export
from admtrt.commands.inspect import inspect
from admtrt.commands.invert import invert
from admtrt.commands.options import Command, Group
from admtrt.commands.presets import presets
from admtrt.commands.sample import sample
from admtrt.commands.serve import serve
from admtrt.commands.train import train_app
from admtrt.commands.triton import triton
from admtrt.commands.verify import verify
from admtrt.console import printable
from admtrt.errors import AdmtrtError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_INTERRUPTED = (130, 143)  # by SIGINT and SIGTERM
_GOES_ON = {
    "sample": "What was finished is kept: sampling goes on with the same command.",
    "invert": "What was finished is kept: inversion goes on with the same command.",
}
_PLACE_FAULTS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.EISDIR,
    }
)
"""OS errors of a path that the user named."""

app = typer.Typer(
    name="admtrt",
    cls=Group,
    help="Train, export, verify and sample ADM diffusion models with classifier guidance.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_GROUPS: Mapping[str, Sequence[Callable[..., None] | tuple[str, typer.Typer]]] = {
    "Draw samples": (sample, invert, serve, triton),
    "From a checkpoint to a bundle": (presets, convert, export, inspect, build),
    "Train": (configure, ("train", train_app), demo),
    "Right, good, fast?": (verify, drift, ("evaluate", evaluate_app), bench, doctor),
}
"""Commands by their panel in ``admtrt --help``."""
for _panel, _members in _GROUPS.items():
    for _member in _members:
        if isinstance(_member, tuple):
            app.add_typer(_member[1], name=_member[0], rich_help_panel=_panel)
        else:
            app.command(cls=Command, rich_help_panel=_panel)(_member)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"admtrt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; never shows a traceback for a foreseen error."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="admtrt")
    except SystemExit as stop:
        if stop.code in _INTERRUPTED:  # typer converts KeyboardInterrupt to exit code 130
            given = list(sys.argv[1:] if arguments is None else arguments)
            _show("interrupted", _GOES_ON.get(given[0] if given else "", ""))
        return stop.code if isinstance(stop.code, int) else 1
    except AdmtrtError as error:
        _show(error.message, error.hint)
        return error.exit_code
    except OSError as error:
        if error.errno not in _PLACE_FAULTS:
            raise
        _show(
            f"cannot use {error.filename or 'the output'}: {error.strerror}",
            "Nothing that existed was changed.",
        )
        return 2
    except MemoryError as error:
        _show(
            f"there is not enough memory: {error}".rstrip(": "),
            "Compute less at once, where there is --batch-size, or end other programs.",
        )
        return 2
    return 0


def _show(message: str, hint: str) -> None:
    sys.stderr.write(printable(f"error: {message}\n" + (f"       {hint}\n" if hint else "")))
