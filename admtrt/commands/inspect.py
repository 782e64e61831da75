"""``admtrt inspect``: what a bundle holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admtrt.console import Output


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check a bundle (schema, hashes, paths) and show its graphs and recommended sampler."""
    from admtrt.bundle import Bundle
    from admtrt.commands.export import show_bundle

    show_bundle(Bundle.open(bundle), Output(json=json))
