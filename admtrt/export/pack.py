"""Checkpoints -> bundle."""

from __future__ import annotations

import math
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import onnx_ir as ir

from admtrt import __version__
from admtrt.bundle import Bundle, GraphEntry, write_bundle
from admtrt.config import DiffusionConfig
from admtrt.contract import (
    MOST_TOP_K,
    NETWORKS,
    GraphName,
    GraphSpec,
    Precision,
    bundle_specs,
    event_shape,
    further_specs,
    largest_values,
    threshold_quantile,
)
from admtrt.errors import ExportError, RequestError
from admtrt.export.check import check_graph, rtx_parser_errors
from admtrt.export.cpu_form import cpu_form
from admtrt.export.engine_form import engine_form
from admtrt.export.graphs import (
    EXAMPLE_BATCH,
    classifier_gradient_graph,
    unet_graph,
    unet_vector_jacobian_graph,
)
from admtrt.export.precision import DEFAULT_ISLANDS, Island, lower
from admtrt.export.small_graphs import FOR_ENGINES, SMALL_GRAPHS
from admtrt.export.write import write_graph
from admtrt.models.classifier import Classifier
from admtrt.models.pair import check_pair, in_units_of
from admtrt.models.unet import UNet

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

    from admtrt.export.tape import ConvBackward
    from admtrt.models.checkpoint import LoadedNetwork
    from admtrt.schedule.sampler import SamplerConfig

_TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir")
_FOR_CPUS: ConvBackward = "flipped"
_FOR_ENGINES: Mapping[Precision, ConvBackward] = {
    "fp32": "transposed",
    "fp16": "transposed",
    "bf16": "flipped",  # engines have no bf16 deconvolution
}


def bundle_from_checkpoints(
    unet: LoadedNetwork,
    classifier: LoadedNetwork | None,
    path: Path,
    *,
    sampler: SamplerConfig | None = None,
    engines: Collection[Precision] = (),
    islands: Collection[Island] = DEFAULT_ISLANDS,
    likelihood: bool = False,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Export a UNet (or upsampler) and, where given, its classifier's gradient, and pack them.

    Args:
        unet: the loaded generator.
        classifier: the noisy classifier, or None for plain sampling.
        path: the bundle's directory.
        sampler: what to recommend; None takes the UNet checkpoint's. Without a classifier its scale is 0.
        engines: precisions in which to add the graphs in the form that inference engines like.
        islands: what stays float32 in those; see :mod:`admtrt.export.precision`.
        likelihood: add the graph ``unet_vector_jacobian``, of more than twice the UNet's size.
        overwrite: replace a bundle that stands there.
        report: called with the name of each stage as it starts.

    Raises:
        CheckpointError: if the two networks do not fit together.
        ExportError: if a graph fails a check.
        OutputError: if the place is taken or cannot be written.
        RequestError: if engines do not take a graph that is asked for.
    """
    assert isinstance(unet.module, UNet)
    generator = unet.module
    check_pair(unet.config, None if classifier is None else classifier.config)
    adapted = None if classifier is None else in_units_of(unet.config.diffusion, classifier)
    guide = None if adapted is None else adapted.module
    assert guide is None or isinstance(guide, Classifier)
    own_unit = None
    if classifier is not None and adapted is not classifier:
        process = classifier.config.diffusion
        assert isinstance(process, DiffusionConfig)  # no other has a unit
        own_unit = process.rescale_timesteps
    recommended = sampler or unet.config.sampler
    specs = bundle_specs(generator.config, None if guide is None else guide.config)
    quantile = threshold_quantile(generator.config, unet.config.threshold_quantile)
    values = math.prod(event_shape(generator.config))
    if engines and largest_values(values, quantile) > MOST_TOP_K:
        raise RequestError(
            f"the quantile {quantile:g} of dynamic thresholds takes the largest "
            f"{largest_values(values, quantile)} of {values} values; engines take at most {MOST_TOP_K}",
            hint="Export without --engine.",
        )

    engine_graphs: dict[Precision, dict[GraphName, GraphEntry]] = {precision: {} for precision in engines}

    def write_graphs(directory: Path) -> dict[GraphName, GraphEntry]:
        graphs: dict[GraphName, GraphEntry] = {}
        for name, spec in specs.items():
            report(name)
            for engine, model in _forms(name, generator, guide, engine_graphs, islands, quantile):
                if engine is None:
                    graphs[name] = _written(model, directory, f"{name}.onnx", spec)
                else:
                    report(f"{name} for engines, {engine}")
                    written = _written(model, directory, f"engine-{engine}/{name}.onnx", spec)
                    precision = engine if name in NETWORKS else "fp32"
                    engine_graphs[engine][name] = written.model_copy(update={"precision": precision})
        if likelihood:
            name = "unet_vector_jacobian"
            report(name)
            model = cpu_form(unet_vector_jacobian_graph(generator))
            graphs[name] = _written(model, directory, f"{name}.onnx", further_specs(generator.config)[name])
        return graphs

    fields = {
        "network": generator.config,
        "event_shape": event_shape(generator.config),
        "threshold_quantile": quantile,
        "classifier": None if guide is None else guide.config,
        "diffusion": unet.config.diffusion,
        "sampler": recommended if guide is not None else recommended.model_copy(update={"scale": 0.0}),
        "class_names": unet.config.class_names
        or (() if classifier is None else classifier.config.class_names),
        "made_with": _versions() | ({"fp32 in engines": ", ".join(islands) or "none"} if engines else {}),
        "engine_graphs": engine_graphs,  # filled while the graphs are written
        "classifier_rescale_timesteps": own_unit,
    }
    return write_bundle(path, write_graphs, fields, overwrite=overwrite)


def _forms(
    name: GraphName,
    unet: UNet,
    classifier: Classifier | None,
    engines: Collection[Precision],
    islands: Collection[Island],
    quantile: float,
) -> Iterator[tuple[Precision | None, ir.Model]]:
    """The form of a graph for CPUs, with None, then that for engines in each precision."""
    if name in SMALL_GRAPHS:  # x itself is never rounded
        own = {"quantile": quantile} if name == "threshold" else {}
        yield None, cpu_form(SMALL_GRAPHS[name](unet.config, **own))
        yield from ((precision, engine_form(FOR_ENGINES[name](unet.config, **own))) for precision in engines)
        return
    captured = {_FOR_CPUS: _graph(name, unet, classifier, _FOR_CPUS)}
    yield None, cpu_form(captured[_FOR_CPUS])
    for precision in engines:
        backward = _FOR_ENGINES[precision] if name == "classifier_gradient" else _FOR_CPUS
        if backward not in captured:
            captured[backward] = _graph(name, unet, classifier, backward)
        model = engine_form(captured[backward])
        lower(model, precision, islands)
        yield precision, model


def _graph(
    name: GraphName, unet: UNet, classifier: Classifier | None, conv_backward: ConvBackward
) -> ir.Model:
    if name == "unet":
        return unet_graph(unet)
    assert classifier is not None
    return classifier_gradient_graph(classifier, conv_backward=conv_backward)


def _written(model: ir.Model, directory: Path, name: str, spec: GraphSpec) -> GraphEntry:
    """Write a graph as a file of the bundle and check it."""
    file = directory / name
    write_graph(model, file)
    check_graph(file, spec, example_batch=EXAMPLE_BATCH)
    errors = rtx_parser_errors(file)
    if errors:
        raise ExportError(f"{name}: the parser of TensorRT-RTX rejects the graph: {'; '.join(errors)}")
    return GraphEntry(file=name, spec=spec, opset=model.opset_imports[""], nodes=len(model.graph))


def _versions() -> dict[str, str]:
    found = {"admtrt": __version__, "python": platform.python_version()}
    for tool in _TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:  # a source build without metadata
            found[tool] = "unknown"
    return found
