"""``admtrt export``: export checkpoints to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from admtrt.commands.options import (
    ClassifierPreset,
    ClassifierSet,
    ClassifierWeights,
    NullClass,
    SettingsFile,
    UnetPreset,
    UnetSet,
    UnetWeights,
    steps_option,
)
from admtrt.commands.requirements import require
from admtrt.commands.solver_options import SolverOptions, method_option, takes_solver_options
from admtrt.console import Output, table
from admtrt.errors import RequestError
from admtrt.export.guides.built_in import FILES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admtrt.bundle import Bundle
    from admtrt.contract import Precision
    from admtrt.export.precision import Island


@takes_solver_options
def export(
    unet: Annotated[
        Path,
        typer.Argument(help="Checkpoint of the UNet or upsampler: .safetensors, .pt, or diffusers' folder."),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the bundle to write.")],
    classifier: Annotated[
        Path | None, typer.Option(help="Checkpoint of the noisy classifier; without it, plain sampling only.")
    ] = None,
    unet_preset: UnetPreset = None,
    classifier_preset: ClassifierPreset = None,
    config: SettingsFile = None,
    unet_set: UnetSet = None,
    classifier_set: ClassifierSet = None,
    unet_weights: UnetWeights = None,
    classifier_weights: ClassifierWeights = None,
    null_class: NullClass = None,
    guide: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GUIDE",
            help="A guide besides the classifier; may be repeated. Built in: "
            f"{', '.join(name for name, file in FILES.items() if not file)} (which needs --null-class); with "
            f"NAME=FILE: {', '.join(name for name, file in FILES.items() if file)}. "
            "NAME=BUILT_IN[:FILE] gives another name; "
            "NAME=package.module:factory imports and runs a module of yours.",
        ),
    ] = None,
    method: Annotated[
        str | None, method_option("Recommended solver", auto="the best of our measurements, docs/solvers.md")
    ] = None,
    steps: Annotated[str | None, steps_option("Recommended steps, e.g. 250 or ddim25.")] = None,
    scale: Annotated[float | None, typer.Option(help="Recommended guidance scale.")] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PRECISION", help="Add graphs for inference engines: fp32, fp16 or bf16; repeatable."
        ),
    ] = None,
    fp32: Annotated[
        str | None,
        typer.Option(
            metavar="ISLANDS",
            help="Parts that stay fp32 in fp16 and bf16 engine graphs: a list of group_norm, softmax, output "
            "(these three by default), embedding, activation, residual; or none.",
        ),
    ] = None,
    likelihood: Annotated[
        bool,
        typer.Option(
            "--likelihood",
            help="Add the UNet's vector-Jacobian product for evaluate nll --method ode; over twice its size.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    *,
    solver_options: SolverOptions,
) -> None:
    """Export a UNet and the input gradient of its classifier as ONNX graphs, packed as a bundle."""
    require("torch", "onnx", "onnxscript", "safetensors", extra="export", purpose="Exporting")
    from admtrt.commands.checkpoints import load_pair, recommended_sampler
    from admtrt.export.guides.named import guides_named
    from admtrt.export.pack import bundle_from_checkpoints

    output = Output(json=json)
    engines, islands = _precisions(engine or ()), _islands(fp32, engine or ())
    generator, noisy = load_pair(
        unet,
        classifier,
        unet_preset=unet_preset,
        classifier_preset=classifier_preset,
        config=config,
        unet_set=unet_set or (),
        classifier_set=classifier_set or (),
        unet_weights=unet_weights,
        classifier_weights=classifier_weights,
        null_class=null_class,
        note=output.note,
    )
    choices = {"method": method, "steps": steps, "scale": scale, **solver_options}
    sampler = recommended_sampler(generator.config, choices)
    if scale and noisy is None:
        raise RequestError(f"--scale {scale:g} recommends guidance without a --classifier")
    bundle = bundle_from_checkpoints(
        generator,
        noisy,
        out,
        guides=guides_named(guide or (), generator),
        sampler=sampler,
        engines=engines,
        islands=islands,
        likelihood=likelihood,
        overwrite=overwrite,
        progress=lambda name: output.note(f"exporting {name}"),
    )
    show_bundle(bundle, output)


def _precisions(names: Sequence[str]) -> list[Precision]:
    from admtrt.contract import PRECISIONS, precision_named

    chosen = {precision_named(name, "--engine") for name in names}
    return [precision for precision in PRECISIONS if precision in chosen]


def _islands(text: str | None, engines: Sequence[str]) -> tuple[Island, ...]:
    from admtrt.export.precision import DEFAULT_ISLANDS, ISLANDS

    if text is None:
        return DEFAULT_ISLANDS
    if not set(engines) & {"fp16", "bf16"}:
        raise RequestError(
            "--fp32 says what stays float32 in fp16 and bf16 engine graphs, but none is made",
            hint="Add --engine fp16 or --engine bf16, or leave --fp32 out.",
        )
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    unknown = next((name for name in names if name not in ISLANDS), None)
    if unknown is not None:
        raise RequestError(f"--fp32 {unknown!r} is unknown; expected some of {', '.join(ISLANDS)}, or none")
    return tuple(island for island in ISLANDS if island in names)


def show_bundle(bundle: Bundle, output: Output) -> None:
    """Print the contents of a bundle."""
    manifest = bundle.manifest
    rows = [
        [
            name,
            "\n".join(str(tensor) for tensor in graph.spec.inputs),
            "\n".join(str(tensor) for tensor in graph.spec.outputs),
            f"{graph.precision}, opset {graph.opset}",
            str(graph.nodes),
        ]
        for name, graph in manifest.graphs.items()
    ]
    engines = [
        [name, precision, f"{graph.precision}, opset {graph.opset}", str(graph.nodes)]
        for precision, graphs in manifest.engine_graphs.items()
        for name, graph in graphs.items()
    ]
    size = sum(entry.size for entry in manifest.files.values())
    text = (
        f"recommended: {manifest.recommendation}; "
        f"classes: {manifest.num_classes or 'none'}; {len(manifest.files)} files, {size / 2**20:.1f} MiB"
    )
    columns = ("graph", "inputs", "outputs", "type", "nodes")
    output.result(
        {"bundle": str(bundle.path), "manifest": manifest.to_dict()},
        table(str(bundle.path), columns, rows),
        *([table("for engines", ("graph", "engine", "type", "nodes"), engines)] if engines else []),
        text,
    )
