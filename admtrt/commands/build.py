"""``admtrt build``: build plans of TensorRT or TensorRT-RTX from a bundle's graphs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from admtrt.console import Output, progress_bar, table
from admtrt.errors import EngineError, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import RenderableType

    from admtrt.bundle import Bundle
    from admtrt.contract import GraphName
    from admtrt.runtime.engines.build import BuildResult, PlanBuilder
    from admtrt.runtime.engines.library import Library
    from admtrt.runtime.engines.options import BuildOptions
    from admtrt.runtime.engines.plans import PlanRecord
    from admtrt.runtime.engines.sources import GraphSource

_PER_GRAPH = 100  # steps of the progress bar


def build(
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    library: Annotated[
        str, typer.Option(help="tensorrt, rtx, or auto: tensorrt if there is a GPU, else rtx.")
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="fp32, fp16 or bf16, if the bundle has engine graphs in that precision.")
    ] = "fp32",
    graph: Annotated[
        list[str] | None, typer.Option(help="Build this graph only; may be repeated. Default: every graph.")
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MIN:BEST:MAX", help="Batch sizes of a profile; may be repeated. Default: 1:4:16."
        ),
    ] = None,
    target: Annotated[
        list[int] | None,
        typer.Option(
            help="rtx: compute capability, e.g. 89 for 8.9; may be repeated. Default: 8.0 and later."
        ),
    ] = None,
    workspace: Annotated[int | None, typer.Option(help="Limit of scratch memory, in MiB.")] = None,
    optimization_level: Annotated[
        int, typer.Option(help="From 0, quick to build, to 5, every tactic tried.")
    ] = 3,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="Let fp32 products round their inputs to TF32: faster, less exact.")
    ] = False,
    timing_cache: Annotated[
        Path | None, typer.Option(help="tensorrt: file of measured kernels, kept between builds.")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="tensorrt: later versions run the plan too.")
    ] = False,
    hardware_compatible: Annotated[
        str | None,
        typer.Option(
            help="tensorrt: ampere_plus or same_compute_capability: let other such GPUs run the plan too."
        ),
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="tensorrt: the plan's weights can be replaced.")
    ] = False,
    strip: Annotated[
        bool, typer.Option("--strip", help="tensorrt: leave the weights out of the plan.")
    ] = False,
    plans: Annotated[
        Path | None, typer.Option(help="Folder that keeps the plans. Default: the bundle's own.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Show what the builder fused, according to its log.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Build plans of a bundle's graphs. Plans already built with the same options are kept.

    TensorRT-RTX builds without a GPU, for several compute capabilities in one plan.
    """
    from admtrt.bundle import Bundle
    from admtrt.runtime.engines.build import PlanBuilder
    from admtrt.runtime.engines.device import query_driver
    from admtrt.runtime.engines.options import BatchProfile, BuildOptions
    from admtrt.runtime.engines.plans import PlanStore

    output = Output(json=json)
    options = BuildOptions.from_dict(
        {
            **({"profiles": [BatchProfile.parse(text) for text in batch]} if batch else {}),
            "targets": sorted(target or ()),
            "workspace": workspace,
            "optimization_level": optimization_level,
            "tf32": tf32,
            "version_compatible": version_compatible,
            "hardware_compatible": hardware_compatible,
            "refit": refit,
            "strip": strip,
        },
        source="build options",
    )
    opened = Bundle.open(bundle)
    sources = _sources(opened, graph or (), precision)
    gpu = query_driver().gpu
    builder = PlanBuilder(
        library=_library(library, gpu=gpu is not None),
        gpu=gpu,
        store=PlanStore.of(opened, plans),
        timing_cache=timing_cache,
        note=output.note,
    )
    builder.check(sources, options)
    _say_first(sources, options, output)
    results = _make(builder, sources, options)
    output.result(_described(opened, builder, results), *_shown(builder.library, results, report=report))


def _library(name: str, *, gpu: bool) -> Library:
    from admtrt.runtime.engines.library import Flavor, choose_library, find_library

    if name == "auto":
        return choose_library(gpu=gpu)
    for flavor in get_args(Flavor):
        if name == flavor:
            return find_library(flavor)
    raise EngineError(f"library {name!r} is unknown; expected auto, {', '.join(get_args(Flavor))}")


def _sources(bundle: Bundle, graphs: Sequence[str], precision: str) -> list[GraphSource]:
    """The requested graphs, or all.

    Raises:
        RequestError: for an unknown graph or precision.
        BundleError: if the bundle does not have a graph in this precision.
    """
    from admtrt.contract import precision_named
    from admtrt.runtime.engines.sources import graph_source

    held: list[GraphName] = list(bundle.manifest.sampled_graphs)
    for name in graphs:
        if name not in held:
            raise RequestError(f"graph {name!r} is unknown; the bundle has {', '.join(held)}")
    chosen = precision_named(precision, "precision")
    return [graph_source(bundle, name, chosen) for name in held if not graphs or name in graphs]


def _say_first(sources: Sequence[GraphSource], options: BuildOptions, output: Output) -> None:
    if not all(source.engine_form for source in sources):
        output.note(
            "the bundle has no fp32 engine graphs; building from the form for CPUs, "
            "whose plans are larger (export with --engine fp32 for the other)"
        )
    if 75 in options.targets:
        output.note(
            "SM75 takes plans in which every matrix product is fp16; one that is not fails the whole plan"
        )


def _make(builder: PlanBuilder, sources: Sequence[GraphSource], options: BuildOptions) -> list[BuildResult]:
    results = []
    with progress_bar("building", _PER_GRAPH * len(sources)) as progress:
        for source in sources:
            bar = _Bar(progress, source.graph)
            results.append(builder.make(source, options, bar.show))
            bar.show(1.0, "done")
    return results


class _Bar:
    """One graph's part of the progress bar."""

    def __init__(self, progress: Callable[[int, str], None], graph: str) -> None:
        self._progress, self._graph = progress, graph
        self._shown = 0

    def show(self, done: float, phase: str) -> None:
        """Show the fraction ``done``, 0 to 1."""
        reached = int(done * _PER_GRAPH)
        self._progress(reached - self._shown, f"{self._graph}: {phase}")
        self._shown = reached


def _described(bundle: Bundle, builder: PlanBuilder, results: Sequence[BuildResult]) -> dict[str, Any]:
    return {
        "bundle": str(bundle.path),
        "library": {"name": builder.library.flavor, "version": builder.library.version},
        "plans": [
            {
                "file": str(builder.store.path(result.record.key)),
                "built": result.built,
                "runs_on": result.record.runs_on,
                "record": result.record.to_dict(),
            }
            for result in results
        ],
    }


def _shown(library: Library, results: Sequence[BuildResult], *, report: bool) -> list[RenderableType]:
    columns = ("graph", "precision", "batches", "size", "built in", "plan")
    rows = [
        [
            result.record.key.graph,
            result.record.key.precision,
            ", ".join(str(profile) for profile in result.record.key.options.profiles),
            f"{result.record.plan.size / 2**20:.1f} MiB",
            f"{result.record.seconds:.1f} s" if result.built else "was there",
            result.record.key.digest[:12],
        ]
        for result in results
    ]
    shown: list[RenderableType] = [
        table(f"{library}", columns, rows),
        f"run on: {results[0].record.runs_on}",
    ]
    if report:
        shown.append(_fusion_table([result.record for result in results]))
    return shown


def _fusion_table(records: Sequence[PlanRecord]) -> RenderableType:
    counts = [record.report.to_dict() for record in records]
    fields = [field for field in counts[0] if field != "kinds"]
    rows = [[field.replace("_", " + "), *(str(each[field]) for each in counts)] for field in fields]
    return table("what the builder made of it", ("", *(record.key.graph for record in records)), rows)
