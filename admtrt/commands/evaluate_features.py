"""``admtrt evaluate features``: make the networks whose features are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admtrt.commands.options import Command, Group
from admtrt.commands.requirements import require
from admtrt.console import Output, progress_bar, table
from admtrt.files import check_place

features_app = typer.Typer(cls=Group, help="Make a feature network, once.", no_args_is_help=True)

_Out = Annotated[Path, typer.Option(help="Folder of the feature network.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@features_app.command(cls=Command)
def inception(
    weights: Annotated[
        Path,
        typer.Argument(help="classify_image_graph_def.pb, or pt_inception-2015-12-05-6726825d.pth."),
    ],
    out: _Out,
    unknown_weights: Annotated[
        bool,
        typer.Option(
            "--unknown-weights", help="Accept a file with another hash. Results are then not comparable."
        ),
    ] = False,
    overwrite: _Overwrite = False,
    json: _Json = False,
) -> None:
    """Convert the weights of FID's Inception to an ONNX graph, and check it against NumPy."""
    require("onnx", extra="export", purpose="Writing the graph")
    if weights.suffix in (".pth", ".pt"):
        require("torch", extra="export", purpose="Reading a .pth file")
    from admtrt.features.folder import make_inception

    check_place(out.parent, folder=True)
    manifest, errors = make_inception(weights, out, unknown_weights=unknown_weights, overwrite=overwrite)
    rows = [["weights", f"{manifest.weights.name}, {'published' if manifest.weights.known else 'unknown'}"]]
    rows += [[f"{name}: largest difference from NumPy", f"{error:.1e}"] for name, error in errors.items()]
    Output(json=json).result(
        {"folder": str(out), "manifest": manifest.to_dict(), "errors": errors},
        table(f"features in {out}", ["quantity", "value"], rows),
    )


@features_app.command(cls=Command)
def judge(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.toml", help="Training file: labelled data with hold_out.")
    ],
    out: _Out,
    part: Annotated[
        str, typer.Option(help="Images it learns from: judge (half of those held out) or held-out (all).")
    ] = "judge",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 2000,
    batch_size: Annotated[int, typer.Option(min=2, help="Images of one step.")] = 64,
    lr: Annotated[float, typer.Option(help="Highest learning rate, after a fifth of the steps.")] = 5e-3,
    seed: Annotated[int, typer.Option(help="Seed of the training; must differ from the guide's.")] = 1,
    overwrite: _Overwrite = False,
    json: _Json = False,
) -> None:
    """Train a judge for small data: a classifier on held-out images that training and the floor do not use.

    It needs PyTorch; judging does not. Never judge with the guide: guidance maximises its score.
    """
    require("torch", "onnx", "safetensors", extra="train", purpose="Training a judge")
    from admtrt.features.folder import make_judge

    check_place(out.parent, folder=True)
    with progress_bar("training the judge", steps) as progress:
        manifest, accuracy = make_judge(
            config,
            out,
            part=part,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
    Output(json=json).result(
        {"folder": str(out), "manifest": manifest.to_dict(), "accuracy": accuracy},
        table(
            f"judge in {out}",
            ["quantity", "value"],
            [
                ["learned from", f"{manifest.made_with['images']} images"],
                ["classes", str(len(manifest.class_names))],
                ["right on images that it did not see", f"{accuracy:.1%}"],
            ],
        ),
    )
