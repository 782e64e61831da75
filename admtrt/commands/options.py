"""Options that several commands share; in a file of their own so that ``--help`` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def _not_empty(text: str | None) -> str | None:
    """An unset shell variable would mean every step of the process."""
    if text is not None and not text.strip():
        raise typer.BadParameter("it is empty; leave it out, or give a number of steps")
    return text


def steps_option(help_text: str) -> Any:
    """An option for a number of steps or a respacing."""
    return typer.Option(help=help_text, callback=_not_empty)


UnetPreset = Annotated[
    str | None,
    typer.Option(help="Published model that an original UNet checkpoint is (it carries no settings)."),
]
ClassifierPreset = Annotated[
    str | None, typer.Option(help="The same for the classifier, e.g. 64x64_classifier.")
]
SettingsFile = Annotated[
    Path | None,
    typer.Option(
        help="TOML with the settings of checkpoints that carry none and match no preset; the file that they "
        "were trained with is one."
    ),
]
UnetWeights = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Which weights to take of a UNet file that has several, e.g. state_dict_ema."
    ),
]
ClassifierWeights = Annotated[
    str | None, typer.Option(metavar="NAME", help="The same for the classifier's file.")
]
NullClass = Annotated[
    int | None,
    typer.Option(
        metavar="INDEX",
        help="Which class of the UNet means none, where it was trained for classifier-free guidance.",
    ),
]
UnetSet = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="One setting of the UNet, e.g. image_size=64; may be repeated."),
]
ClassifierSet = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="One of the classifier; may be repeated.")
]
BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        help="onnxruntime, openvino, onnxruntime-cuda, onnxruntime-tensorrt, onnxruntime-rtx, tensorrt; "
        "auto measures those that are installed and takes the fastest.",
    ),
]
PrecisionName = Annotated[
    str, typer.Option("--precision", help="fp32, fp16 or bf16, where the backend has it.")
]
PlanFolder = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        help="tensorrt: folder of plans, all of which are trusted. Left out: the bundle's own, of which only "
        "those are run that were built here.",
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; every core where left out.")]
