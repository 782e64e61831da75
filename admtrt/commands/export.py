"""``admtrt export``: checkpoints to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from admtrt.commands.options import ClassifierPreset, ClassifierSet, SettingsFile, UnetPreset, UnetSet
from admtrt.commands.requirements import require
from admtrt.console import Output, table
from admtrt.errors import RequestError

if TYPE_CHECKING:
    from admtrt.bundle import Bundle


def export(
    unet: Annotated[Path, typer.Argument(help="Checkpoint of the UNet or upsampler (.safetensors or .pt).")],
    out: Annotated[Path, typer.Option(help="Directory of the bundle to write.")],
    classifier: Annotated[
        Path | None, typer.Option(help="Checkpoint of the noisy classifier; without it, plain sampling only.")
    ] = None,
    unet_preset: UnetPreset = None,
    classifier_preset: ClassifierPreset = None,
    config: SettingsFile = None,
    unet_set: UnetSet = None,
    classifier_set: ClassifierSet = None,
    method: Annotated[str | None, typer.Option(help="Recommended sampler: ddpm or ddim.")] = None,
    steps: Annotated[str | None, typer.Option(help="Recommended steps, e.g. 250 or ddim25.")] = None,
    scale: Annotated[float | None, typer.Option(help="Recommended guidance scale.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a bundle that stands there.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Export a UNet and the input gradient of its classifier as ONNX graphs, packed as a bundle."""
    require("torch", "onnx", "onnxscript", "safetensors", extra="export", purpose="Exporting")
    from admtrt.commands.checkpoints import load_pair, recommended_sampler
    from admtrt.export.pack import bundle_from_checkpoints

    output = Output(json=json)
    generator, guide = load_pair(
        unet,
        classifier,
        unet_preset=unet_preset,
        classifier_preset=classifier_preset,
        config=config,
        unet_set=unet_set or (),
        classifier_set=classifier_set or (),
        note=output.note,
    )
    sampler = recommended_sampler(generator.config, method=method, steps=steps, scale=scale)
    if scale and guide is None:
        raise RequestError(f"--scale {scale:g} recommends guidance without a --classifier")
    bundle = bundle_from_checkpoints(
        generator,
        guide,
        out,
        sampler=sampler,
        overwrite=overwrite,
        report=lambda name: output.note(f"exporting {name}"),
    )
    show_bundle(bundle, output)


def show_bundle(bundle: Bundle, output: Output) -> None:
    """Print what a bundle holds."""
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
    size = sum(entry.size for entry in manifest.files.values())
    sampler = manifest.sampler
    text = (
        f"recommended: {sampler.method}, steps {sampler.steps or manifest.diffusion.steps}, "
        f"scale {sampler.scale:g}; "
        f"classes: {manifest.num_classes or 'none'}; {len(manifest.files)} files, {size / 2**20:.1f} MiB"
    )
    columns = ("graph", "inputs", "outputs", "type", "nodes")
    output.result(
        {"bundle": str(bundle.path), "manifest": manifest.to_dict()},
        table(str(bundle.path), columns, rows),
        text,
    )
