"""Checkpoints -> bundle."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import onnx_ir as ir

from admtrt import __version__
from admtrt.bundle import Bundle, GraphEntry, check_networks, write_bundle
from admtrt.contract import GraphName, bundle_specs
from admtrt.errors import CheckpointError, ExportError
from admtrt.export.capture import OPSET
from admtrt.export.check import check_graph, rtx_parser_errors
from admtrt.export.graphs import EXAMPLE_BATCH, classifier_gradient_graph, unet_graph, update_graph
from admtrt.export.write import write_graph
from admtrt.models.classifier import Classifier
from admtrt.models.unet import UNet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from admtrt.config import SamplerConfig
    from admtrt.models.checkpoint import LoadedNetwork

_TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir")


def bundle_from_checkpoints(
    unet: LoadedNetwork,
    classifier: LoadedNetwork | None,
    path: Path,
    *,
    sampler: SamplerConfig | None = None,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Export a UNet (or upsampler) and, where given, its classifier's gradient, and pack them.

    Args:
        unet: the loaded generator.
        classifier: the noisy classifier, or None for plain sampling.
        path: the bundle's directory.
        sampler: what to recommend; None takes the UNet checkpoint's. Without a classifier its scale is 0.
        overwrite: replace a bundle that stands there.
        report: called with the name of each stage as it starts.

    Raises:
        CheckpointError: if the two networks do not fit together.
        ExportError: if a graph fails a check.
        OutputError: if the place is taken or cannot be written.
    """
    assert isinstance(unet.module, UNet)
    generator = unet.module
    guide = None if classifier is None else classifier.module
    assert guide is None or isinstance(guide, Classifier)
    try:
        check_networks(generator.config, None if guide is None else guide.config, unet.config.diffusion)
    except ValueError as error:
        raise CheckpointError(str(error), hint="Export networks that were trained for each other.") from None
    if classifier is not None and classifier.config.diffusion != unet.config.diffusion:
        _check_same_process(unet, classifier)
    recommended = sampler or unet.config.sampler
    specs = bundle_specs(generator.config, None if guide is None else guide.config)

    def write_graphs(directory: Path) -> dict[GraphName, GraphEntry]:
        entries: dict[GraphName, GraphEntry] = {}
        for name, spec in specs.items():
            report(name)
            model = _graph(name, generator, guide)
            file = directory / f"{name}.onnx"
            write_graph(model, file)
            check_graph(file, spec, example_batch=EXAMPLE_BATCH)
            errors = rtx_parser_errors(file)
            if errors:
                raise ExportError(f"{name}: the TensorRT parser rejects the graph: {'; '.join(errors)}")
            entries[name] = GraphEntry(file=file.name, spec=spec, opset=OPSET, nodes=len(list(model.graph)))
        return entries

    fields = {
        "unet": generator.config,
        "classifier": None if guide is None else guide.config,
        "diffusion": unet.config.diffusion,
        "sampler": recommended if guide is not None else recommended.model_copy(update={"scale": 0.0}),
        "class_names": unet.config.class_names
        or (() if classifier is None else classifier.config.class_names),
        "made_with": _versions(),
    }
    return write_bundle(path, write_graphs, fields, overwrite=overwrite)


def _graph(name: GraphName, unet: UNet, classifier: Classifier | None) -> ir.Model:
    if name == "unet":
        return unet_graph(unet)
    if name == "update":
        return update_graph(unet.config)
    assert classifier is not None
    return classifier_gradient_graph(classifier)


def _check_same_process(unet: LoadedNetwork, classifier: LoadedNetwork) -> None:
    """The two may differ in what the UNet predicts, but not in the noise that they were trained on."""
    for field in ("steps", "schedule", "rescale_timesteps"):
        ours, theirs = getattr(unet.config.diffusion, field), getattr(classifier.config.diffusion, field)
        if ours != theirs:
            raise CheckpointError(
                f"the UNet was trained with diffusion.{field} = {ours!r}, the classifier with {theirs!r}",
                hint="Train the classifier on the UNet's noise: with the same [diffusion] section.",
            )


def _versions() -> dict[str, str]:
    found = {"admtrt": __version__, "python": platform.python_version()}
    for tool in _TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:  # a source build without metadata
            found[tool] = "unknown"
    return found
