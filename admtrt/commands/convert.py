"""``admtrt convert``: convert checkpoints between the original layout and a self-describing one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from admtrt.commands.requirements import require
from admtrt.console import Output
from admtrt.errors import RequestError

if TYPE_CHECKING:
    from admtrt.presets import Kind


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Checkpoint: .safetensors, .pt, .pth, or diffusers' folder.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="File to write; its suffix decides the layout.")
    ],
    preset: Annotated[str | None, typer.Option(help="Published model that the checkpoint is.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML with the settings of a checkpoint that carries none.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the checkpoint; may be repeated."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which weights to take from a file with several, e.g. ema."),
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(help="Round the weights to this type. Default: keep their type."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a checkpoint as .safetensors with its configuration inside, or as the original's .pt.

    Names, types and bytes of the tensors are kept, except that --dtype rounds them and tensors of diffusers'
    folders get ADM's names.
    """
    require("torch", "safetensors", extra="export", purpose="Converting")
    from admtrt.commands.checkpoints import Description, identify_described
    from admtrt.models.checkpoint import check_target, convert_checkpoint, open_checkpoint, rounded
    from admtrt.models.weights import DTYPES

    output = Output(json=json)
    if preset is not None and config is not None:
        raise RequestError("--preset and --config both say what the checkpoint is", hint="Give one of them.")
    check_target(target, overwrite=overwrite)
    stored = open_checkpoint(source, weights)
    kinds: tuple[Kind, ...] = ("unet", "upsampler", "classifier")
    description = Description(preset=preset, config=config, settings=set_ or ())
    found = None
    if target.suffix.lower() == ".safetensors" or stored.embedded is not None or description:
        found = identify_described(stored, kinds=kinds, description=description, note=output.note).config
    if dtype is not None:
        stored = rounded(stored, DTYPES[dtype])
    convert_checkpoint(stored, target, found, overwrite=overwrite)
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in stored.tensors.values()})
    parameters = sum(value.numel() for value in stored.tensors.values())
    size = target.stat().st_size
    output.result(
        {
            "source": str(source),
            "target": str(target),
            "tensors": len(stored.tensors),
            "parameters": parameters,
            "dtypes": dtypes,
            "bytes": size,
            "config": None if found is None else found.to_dict(),
        },
        f"{target}: {'' if found is None else f'{found.kind}, '}{len(stored.tensors)} tensors, "
        f"{parameters / 1e6:.1f} M parameters, {', '.join(dtypes)}, {size / 2**20:.1f} MiB",
    )
