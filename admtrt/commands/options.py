"""Options that several commands share, in a module of their own so that ``--help`` stays quick."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from admtrt.commands.panels import arrange, examples
from admtrt.runtime.backends.names import NAMES


class _FlagsAlone:
    """Shows no type beside a flag: nothing is given there."""

    def get_params(self, ctx: Any) -> list[Any]:
        """All parameters, ``--help`` and what typer adds for completion among them."""
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if getattr(parameter, "is_flag", False) and parameter.metavar is None:
                parameter.metavar = ""
        return parameters


class Group(_FlagsAlone, TyperGroup):
    """A group of commands."""


class Command(_FlagsAlone, TyperCommand):
    """A command with its panels, short options and examples.

    It accepts ``--cache``, the former name of ``--plans``.
    """

    def __init__(self, name: str | None, **given: Any) -> None:
        super().__init__(name, **(given | {"epilog": examples(name or "")}))
        arrange(name or "", self.params)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Replace the former name, which no help shows, by the option's name."""
        options = list(takewhile(lambda word: word != "--", args))
        names = [word.partition("=")[0] for word in options]
        if "--cache" in names and any("--plans" in parameter.opts for parameter in self.params):
            if "--plans" in names:
                ctx.fail("--plans and --cache, its former name, were given; expected one of them")
            renamed = [re.sub(r"^--cache(?==|$)", "--plans", word) for word in options]
            args = [*renamed, *args[len(options) :]]
        return super().parse_args(ctx, args)


def _not_empty(text: str | None) -> str | None:
    """Refuse an empty text: an unset shell variable would mean every step of the process."""
    if text is not None and not text.strip():
        raise typer.BadParameter("it is empty; leave it out, or give a number of steps")
    return text


def steps_option(help_text: str) -> Any:
    """An option for a number of steps or a respacing."""
    return typer.Option(help=help_text, callback=_not_empty)


UnetPreset = Annotated[
    str | None,
    typer.Option(help="Published model in an original UNet checkpoint (which contains no settings)."),
]
ClassifierPreset = Annotated[
    str | None, typer.Option(help="The same for the classifier, e.g. 64x64_classifier.")
]
SettingsFile = Annotated[
    Path | None,
    typer.Option(
        help="TOML with settings, for checkpoints that contain none and match no preset; for example "
        "their training file."
    ),
]
UnetWeights = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Which weights to take from a UNet file with several, e.g. state_dict_ema."
    ),
]
ClassifierWeights = Annotated[
    str | None, typer.Option(metavar="NAME", help="The same for the classifier's file.")
]
NullClass = Annotated[
    int | None,
    typer.Option(
        metavar="INDEX",
        help="The UNet's null class, if it was trained for classifier-free guidance.",
    ),
]
UnetSet = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="A setting of the UNet, e.g. image_size=64; may be repeated."),
]
ClassifierSet = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="A setting of the classifier; may be repeated.")
]
BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        help=f"{', '.join(NAMES)}; auto measures the installed ones and uses the fastest.",
    ),
]
PrecisionName = Annotated[
    str, typer.Option("--precision", help="fp32, fp16 or bf16, if the backend supports it.")
]
PlanFolder = Annotated[
    Path | None,
    typer.Option(
        "--plans",
        metavar="DIR",
        help="tensorrt: folder of trusted plans. Default: the bundle's own plans, of which only those built "
        "on this machine are run.",
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: every core.")]
