"""Export checkpoints to a bundle."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from admtrt import __version__
from admtrt.bundle import Bundle, GraphEntry, check_references, write_bundle
from admtrt.config import DiffusionConfig
from admtrt.contract import (
    MOST_TOP_K,
    GraphName,
    GraphSpec,
    Precision,
    bundle_specs,
    event_shape,
    further_specs,
    graph_of,
    is_network,
    largest_values,
    threshold_quantile,
)
from admtrt.errors import CheckpointError, ExportError, LossError, RequestError
from admtrt.export.check import check_graph, rtx_parser_errors
from admtrt.export.cost import operations, peak_bytes
from admtrt.export.cpu_form import cpu_form
from admtrt.export.engine_form import engine_form
from admtrt.export.graphs import (
    EXAMPLE_BATCH,
    classifier_gradient_graph,
    unet_graph,
    unet_vector_jacobian_graph,
)
from admtrt.export.guides.check import check_loss
from admtrt.export.guides.graphs import guide_graph
from admtrt.export.guides.guide import Guide
from admtrt.export.precision import DEFAULT_ISLANDS, Island, lower
from admtrt.export.shared import SharedWeights
from admtrt.export.small_graphs import FOR_ENGINES, SMALL_GRAPHS
from admtrt.export.write import write_graph
from admtrt.installing import version_of
from admtrt.models.classifier import Classifier
from admtrt.models.pair import check_pair, in_units_of
from admtrt.models.unet import UNet

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from admtrt.export.guides.guide import AnyGuide
    from admtrt.export.tape import ConvBackward
    from admtrt.models.checkpoint import LoadedNetwork
    from admtrt.schedule.sampler import SamplerConfig

_REFERENCE = "Name the null class with --null-class, or give a network for the same images and classes."
_TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir")
_FOR_CPUS: ConvBackward = "flipped"
_FOR_ENGINES: Mapping[Precision, ConvBackward] = {
    "fp32": "transposed",
    "fp16": "transposed",
    "bf16": "flipped",  # engines have no bf16 transposed convolution
}


def bundle_from_checkpoints(
    unet: LoadedNetwork,
    classifier: LoadedNetwork | None,
    path: Path,
    *,
    guides: Sequence[AnyGuide] = (),
    sampler: SamplerConfig | None = None,
    engines: Collection[Precision] = (),
    islands: Collection[Island] = DEFAULT_ISLANDS,
    likelihood: bool = False,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Export a UNet (or upsampler) and, if given, its classifier's gradient, into a bundle.

    Args:
        unet: the loaded generator.
        classifier: the noisy classifier, or None for plain sampling.
        path: the bundle's directory.
        guides: further guides, with different names.
        sampler: the recommended sampler; None takes the UNet checkpoint's. Without a classifier its scale is
            0.
        engines: precisions in which to add the engine form of the graphs.
        islands: the parts that stay float32 in those; see :mod:`admtrt.export.precision`.
        likelihood: add the graph ``unet_vector_jacobian``, which is more than twice as large as the UNet's.
        overwrite: replace an existing bundle.
        progress: called with the name of each stage as it starts.

    Raises:
        CheckpointError: if the two networks do not fit together.
        ExportError: if a graph or a guide's loss fails a check.
        OutputError: if the path exists already or cannot be written.
        RequestError: if a requested graph has no engine form.
    """
    assert isinstance(unet.module, UNet)
    generator = unet.module
    check_pair(unet.config, None if classifier is None else classifier.config)
    adapted = None if classifier is None else in_units_of(unet.config.diffusion, classifier)
    noisy = None if adapted is None else adapted.module
    assert noisy is None or isinstance(noisy, Classifier)
    networks = _Networks(generator, noisy, _by_name(guides, event_shape(generator.config)))
    own_unit = None
    if classifier is not None and adapted is not classifier:
        process = classifier.config.diffusion
        assert isinstance(process, DiffusionConfig)  # only discrete processes have a unit of t
        own_unit = process.rescale_timesteps
    recommended = sampler or unet.config.sampler
    described = {name: guide.config for name, guide in networks.guides.items()}
    try:
        check_references(generator.config, described)  # fail before minutes of export
    except ValueError as error:
        raise CheckpointError(str(error), hint=_REFERENCE) from None
    specs = bundle_specs(generator.config, None if noisy is None else noisy.config, described)
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
        shared = SharedWeights()
        graphs: dict[GraphName, GraphEntry] = {}
        for name, spec in specs.items():
            progress(name)
            for engine, model in networks.forms(name, engine_graphs, islands, quantile):
                if engine is None:
                    graphs[name] = _written(model, directory, f"{name}.onnx", spec, shared)
                else:
                    progress(f"{name} for engines, {engine}")
                    written = _written(model, directory, f"engine-{engine}/{name}.onnx", spec, shared)
                    precision = engine if is_network(name) else "fp32"
                    engine_graphs[engine][name] = written.model_copy(update={"precision": precision})
        if likelihood:
            name = "unet_vector_jacobian"
            progress(name)
            model = cpu_form(unet_vector_jacobian_graph(generator))
            spec = further_specs(generator.config)[name]
            graphs[name] = _written(model, directory, f"{name}.onnx", spec, shared)
        return graphs

    fields = {
        "network": generator.config,
        "event_shape": event_shape(generator.config),
        "threshold_quantile": quantile,
        "classifier": None if noisy is None else noisy.config,
        "diffusion": unet.config.diffusion,
        "sampler": recommended if noisy is not None else recommended.model_copy(update={"scale": 0.0}),
        "class_names": unet.config.class_names
        or (() if classifier is None else classifier.config.class_names),
        "made_with": _versions() | ({"fp32 in engines": ", ".join(islands) or "none"} if engines else {}),
        "engine_graphs": engine_graphs,  # filled while the graphs are written
        "classifier_rescale_timesteps": own_unit,
        "guides": described,
    }
    return write_bundle(path, write_graphs, fields, overwrite=overwrite)


def _by_name(guides: Sequence[AnyGuide], event: tuple[int, ...]) -> dict[str, AnyGuide]:
    """The guides by name, after checking their losses on images of a shape.

    Raises:
        LossError: if a name is used twice, or a loss is invalid.
    """
    named: dict[str, AnyGuide] = {}
    for guide in guides:
        if guide.name in named:
            raise LossError(f"two guides are called '{guide.name}'", hint="Give one another name.")
        named[guide.name] = guide
        if isinstance(guide, Guide):
            check_loss(guide, event)
    return named


@dataclass(frozen=True, eq=False)
class _Networks:
    """The networks and guides to export."""

    unet: UNet
    classifier: Classifier | None
    guides: Mapping[str, AnyGuide]

    def forms(
        self, name: GraphName, engines: Collection[Precision], islands: Collection[Island], quantile: float
    ) -> Iterator[tuple[Precision | None, ir.Model]]:
        """Yield the CPU form of a graph (precision None), then the engine form in each precision."""
        if name in SMALL_GRAPHS:  # the update must not round x
            described = {guide.name: guide.config for guide in self.guides.values()}
            given = (self.unet.config, described, quantile)
            yield None, cpu_form(SMALL_GRAPHS[name](*given))
            yield from ((precision, engine_form(FOR_ENGINES[name](*given))) for precision in engines)
            return
        captured = {(_FOR_CPUS, False): self._graph(name, _FOR_CPUS, boosted=False)}
        yield None, cpu_form(captured[_FOR_CPUS, False])
        for precision in engines:
            form = (_FOR_ENGINES[precision], precision == "fp16") if name != "unet" else (_FOR_CPUS, False)
            if form not in captured:
                captured[form] = self._graph(name, form[0], boosted=form[1])
            model = engine_form(captured[form])
            lower(model, precision, islands)
            yield precision, model

    def _graph(self, name: GraphName, conv_backward: ConvBackward, *, boosted: bool) -> ir.Model:
        if name == "unet":
            return unet_graph(self.unet)
        for guide in self.guides.values():
            if graph_of(guide.name, guide.config) == name:
                return guide_graph(self.unet, guide, conv_backward=conv_backward, boosted=boosted)
        assert self.classifier is not None
        return classifier_gradient_graph(self.classifier, conv_backward=conv_backward)


def _written(
    model: ir.Model, directory: Path, name: str, spec: GraphSpec, shared: SharedWeights
) -> GraphEntry:
    """Write a graph into the bundle and check it."""
    file = directory / name
    write_graph(model, file, shared=shared)
    check_graph(file, spec, example_batch=EXAMPLE_BATCH)
    errors = rtx_parser_errors(file)
    if errors:
        raise ExportError(f"{name}: the parser of TensorRT-RTX rejects the graph: {'; '.join(errors)}")
    return GraphEntry(
        file=name,
        spec=spec,
        opset=model.opset_imports[""],
        nodes=len(model.graph),
        operations=operations(model) or None,
        peak_bytes=peak_bytes(model) if operations(model) else None,
    )


def _versions() -> dict[str, str]:
    tools = {tool: version_of(tool) or "unknown" for tool in _TOOLS}  # a source build may have no metadata
    return {"admtrt": __version__, "python": platform.python_version(), **tools}
