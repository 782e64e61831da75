"""``admtrt configure``: write a commented training file for existing images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from admtrt.console import Output
from admtrt.errors import OutputError

if TYPE_CHECKING:
    from admtrt.data.sources import Source

_LOOKED_AT = 1000  # files of a folder to read sizes from
_LARGEST = 64  # pixels, the largest proposed size: larger images take days on one GPU
_LEAST_SIDE = 7  # pixels at the coarsest level
_MOST_LEVELS = 4
_ATTENDING = 16  # pixels: attention is cheap up to this size


@dataclass(frozen=True)
class Seen:
    """Properties of the images found.

    Attributes:
        count: number of images.
        size: proposed height and width.
        channels: 1 for grey images, else 3.
        classes: class names; empty without labels.
        sides: a phrase about the sizes of the images.
    """

    count: int
    size: int
    channels: int
    classes: tuple[str, ...]
    sides: str


def configure(
    source: Annotated[str, typer.Argument(help="Folder of images, .npz, IDX file or folder, or digits.")],
    out: Annotated[Path, typer.Option(metavar="FILE.toml", help="The file to write.")],
    size: Annotated[
        int | None,
        typer.Option(min=4, max=1024, help="Height and width to train on. Default: chosen from the images."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Look at images and write a commented training file with sound sizes for them.

    Every image is decoded once, so that unusable images are reported now.
    """
    import tomllib

    from admtrt.files import atomic_file
    from admtrt.run_config import RunConfig

    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists", hint="Choose another name, or pass --overwrite to replace it.")
    seen = look(source, size)
    text = training_file(source, seen)
    RunConfig.from_dict(tomllib.loads(text), source=str(out))
    with atomic_file(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    tasks = ["classifier", "unet"] if len(seen.classes) > 1 else ["unet"]
    commands = [f"admtrt train {task} {out} --out runs/{out.stem}" for task in tasks]
    Output(json=json).result(
        {
            "file": str(out),
            "images": seen.count,
            "image_size": seen.size,
            "channels": seen.channels,
            "classes": list(seen.classes),
        },
        f"{out}: {seen.count} images {seen.sides}, trained on at {seen.size}x{seen.size} in {seen.channels} "
        f"channel{'s' * (seen.channels > 1)}, {len(seen.classes) or 'no'} classes",
        *(f"next: {command}" for command in commands),
    )


def look(source: str, size: int | None) -> Seen:
    """Read the images as training will.

    Raises:
        DataError: as training would.
    """
    from admtrt.data.sources import read_source
    from admtrt.run_config import DataConfig

    fields = {"source": source, "image_size": size or 8}
    found = read_source(DataConfig.from_dict(fields, source="the images"))
    sides, channels = _sides(found)
    low, high = sides[0], sides[-1]
    proposed = size or _proposed(sides[len(sides) // 2], exact=low == high)
    return Seen(
        len(found.images), proposed, channels, found.class_names,
        f"of {low} pixels" if low == high else f"of {low} to {high} pixels",
    )  # fmt: skip


def _sides(found: Source) -> tuple[list[int], int]:
    """The shorter sides of images, sorted, and their channels."""
    if not isinstance(found.images, tuple):
        _, height, width, channels = found.images.shape
        return [min(height, width)], 1 if channels < 3 else 3
    from admtrt.data.sources import open_image

    sides, grey = [], True
    for file in found.images[:_LOOKED_AT]:
        with open_image(file) as image:
            sides.append(min(image.size))
            grey &= image.mode in ("1", "L", "LA")
    return sorted(sides), 1 if grey else 3


def _proposed(side: int, *, exact: bool) -> int:
    """Propose the images' own size if it is small and can be halved, else a power of two."""
    if exact and side <= _LARGEST and side % 4 == 0:
        return side
    return max(power for power in (8, 16, 32, _LARGEST) if power <= max(side, 8))


def training_file(source: str, seen: Seen) -> str:
    """The text of the training file."""
    import json

    levels, side = 1, seen.size
    while levels < _MOST_LEVELS and side % 2 == 0 and side // 2 >= _LEAST_SIDE:
        levels, side = levels + 1, side // 2
    sizes = [seen.size >> level for level in range(levels)]
    attending = [one for one in sizes[1:] if one <= _ATTENDING] or sizes[-1:]
    width = 32 if seen.size <= 8 else 64 if seen.size <= 32 else 128
    batch = 128 if seen.size <= 16 else 64 if seen.size <= 32 else 16
    labelled = len(seen.classes) > 1
    name = json.dumps(source, ensure_ascii=False)
    lines = [
        f"# Written by admtrt configure: {seen.count} images {seen.sides}. Every key: docs/configuration.md.",
        "# Training takes the GPU where PyTorch sees one, else the CPU.",
        "",
        "[data]",
        f"source = {name}",
        f"image_size = {seen.size}  # the networks take it from here",
        f"channels = {seen.channels}",
        "random_flip = false  # true where a mirrored image is as good as the image",
        "hold_out = 0.05  # kept for the held-out loss, and for judging",
        "",
        "[diffusion]",
        "steps = 1000",
        'schedule = "cosine"  # better than "linear" for small images',
        "",
        "[unet]  # larger: model_channels, then num_res_blocks",
        f"model_channels = {width}",
        f"channel_mult = {[1, 2, 2, 2][:levels]}  # one for each level: {', '.join(map(str, sizes))} pixels",
        "num_res_blocks = 2",
        f"attention_resolutions = {attending}",
        "num_head_channels = 32",
        *[f"# num_classes = {len(seen.classes)}  # class-conditional, beside the classifier"] * labelled,
        "",
        "[train_unet]",
        "steps = 20000  # more is better; --resume goes on",
        f"batch_size = {batch}  # with accumulate = N a step is made of N smaller batches",
        "lr = 2e-4",
        "ema_rates = [0.999]",
        "checkpoint_every = 1000",
        "sample_every = 1000",
    ]
    if labelled:
        lines += [
            "",
            "[classifier]  # guides the samples to a class",
            f"num_classes = {len(seen.classes)}  # {_listed(seen.classes)}",
            "model_channels = 32",
            f"channel_mult = {[1, 2, 2, 2][:levels]}",
            "num_res_blocks = 1",
            f"attention_resolutions = {attending}",
            "num_head_channels = 32",
            "",
            "[train_classifier]",
            "steps = 5000",
            f"batch_size = {batch}",
            "ema_rates = [0.99]",
            "checkpoint_every = 1000",
        ]
    lines += ["", "[sampler]", 'steps = "100"', f"scale = {1.0 if labelled else 0.0}"]
    return "\n".join(lines) + "\n"


def _listed(names: tuple[str, ...]) -> str:
    from admtrt.runtime.request import some_names

    shown = some_names([" ".join(name.split()) for name in names])
    return "".join(each if each.isprintable() else "?" for each in shown)
