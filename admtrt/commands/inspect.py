"""``admtrt inspect``: show a bundle's contents and where its plans run, or identify a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from admtrt.console import Output, table
from admtrt.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from admtrt.bundle import Bundle, GraphEntry, Manifest
    from admtrt.contract import GraphName
    from admtrt.runtime.engines.plans import PlanRecord


def inspect(
    bundle: Annotated[
        Path,
        typer.Argument(help="Directory of the bundle; or a checkpoint, also a diffusers folder."),
    ],
    plans: Annotated[Path | None, typer.Option(help="Folder of plans. Default: the bundle's own.")] = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="PLAN", help="List the layers of the plan whose name begins so; needs its GPU."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check a bundle and its plans (schema, hashes, paths); show graphs, plans and recommended sampler.

    For a checkpoint: show its network, process and recommended sampler.
    """
    from admtrt.commands.inspect_checkpoint import is_checkpoint, show_checkpoint

    if is_checkpoint(bundle):
        if plans is not None or layers is not None:
            raise RequestError(f"{bundle} is a checkpoint, which has no plans", hint="Leave out the options.")
        show_checkpoint(bundle, Output(json=json))
        return
    from admtrt.bundle import Bundle
    from admtrt.runtime.engines.plans import PlanStore
    from admtrt.runtime.trt.layers import plan_layers

    opened = Bundle.open(bundle)
    if plans is not None and not plans.is_dir():
        raise RequestError(
            f"{plans} is no folder of plans", hint=f"Make plans with: admtrt build {bundle} --plans {plans}"
        )
    store = PlanStore.of(opened, plans)
    records, faults = store.records()
    listed = None if layers is None else plan_layers(opened, store, _chosen(records, layers))
    judged = [(record, is_current(record, opened), store.fault(record, whole=True)) for record in records]
    manifest, forms = opened.manifest, _forms(opened)
    data: dict[str, Any] = {
        "bundle": str(opened.path),
        "manifest": manifest.to_dict(),
        "graphs": [
            {"graph": name, "form": form, "precision": entry.precision, "bytes": _bytes(opened, entry)}
            for form, graphs in forms.items()
            for name, entry in graphs.items()
        ],
        "plans": [
            {
                "key": record.key.digest,
                "runs_on": record.runs_on,
                "current": current,
                "fault": fault,
                **record.to_dict(),
            }
            for record, current, fault in judged
        ],
    }
    output = Output(json=json)
    for fault in faults:
        output.note(fault)
    shown = _shown(opened, forms, judged)
    if listed is not None:
        data["layers"] = [asdict(layer) for layer in listed]
        rows = [[layer.name, layer.kind, "\n".join(layer.outputs)] for layer in listed]
        shown.append(table(f"layers of plan {layers}", ("layer", "kind", "outputs"), rows))
    output.result(data, *shown)


def _chosen(records: Sequence[PlanRecord], beginning: str) -> PlanRecord:
    """The plan whose name begins with ``prefix``.

    Raises:
        RequestError: if no plan or several plans match.
    """
    found = [record for record in records if record.key.digest.startswith(beginning)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(record.key.digest[:12] for record in found or records)
    raise RequestError(
        f"{len(found) or 'no'} plans have a name that begins with {beginning!r}"
        + (f"; there are {names}" if names else ""),
        hint="The last column of the table of plans has their names.",
    )


def is_current(record: PlanRecord, bundle: Bundle) -> bool:
    """True if a plan was built from the bundle's current graph."""
    from admtrt.errors import BundleError
    from admtrt.runtime.engines.sources import graph_source

    try:
        return graph_source(bundle, record.key.graph, record.key.precision).digest == record.key.onnx
    except BundleError:
        return False


def _forms(bundle: Bundle) -> dict[str, Mapping[GraphName, GraphEntry]]:
    """The CPU graphs and the engine graphs, by the name of the form for people."""
    manifest = bundle.manifest
    engines = {f"engine {precision}": graphs for precision, graphs in manifest.engine_graphs.items()}
    return {"cpu fp32": manifest.graphs, **engines}


def _bytes(bundle: Bundle, entry: GraphEntry) -> int:
    """Bytes of a graph's file and its external weights."""
    return sum(bundle.manifest.files[name].size for name in bundle.graph_files(entry))


def _shown(
    bundle: Bundle,
    forms: Mapping[str, Mapping[GraphName, GraphEntry]],
    plans: Sequence[tuple[PlanRecord, bool, str]],
) -> list[RenderableType]:
    from admtrt.runtime.request import numbered_names

    manifest = bundle.manifest
    tensors = [
        [
            name,
            "\n".join(str(tensor) for tensor in graph.spec.inputs),
            "\n".join(str(tensor) for tensor in graph.spec.outputs),
        ]
        for name, graph in manifest.graphs.items()
    ]
    graphs = [
        [name, form, f"{graph.opset}", f"{graph.nodes}", _size(_bytes(bundle, graph))]
        for form, entries in forms.items()
        for name, graph in entries.items()
    ]
    size = sum(entry.size for entry in manifest.files.values())
    names = numbered_names(manifest.class_names)
    return [
        table(str(bundle.path), ("graph", "inputs", "outputs"), tensors),
        table("forms", ("graph", "form", "opset", "nodes", "size"), graphs),
        *([_guide_table(manifest)] if manifest.guides else []),
        *([_plan_table(plans)] if plans else [f"no plans; build them with: admtrt build {bundle.path}"]),
        f"recommended: {manifest.recommendation}; classes: {manifest.num_classes or 'none'}; "
        f"{len(manifest.files)} files, {_size(size)}",
        *([f"classes: {names}"] if names else []),
    ]


def _guide_table(manifest: Manifest) -> RenderableType:
    rows = [
        [
            name,
            guide.loss,
            guide.place,
            f"{guide.scale:g}",
            guide.normalise,
            "\n".join(f"{target} [{', '.join(map(str, sizes))}]" for target, sizes in guide.targets.items()),
        ]
        for name, guide in manifest.guides.items()
    ]
    return table("guides", ("guide", "loss", "place", "scale", "normalised", "targets"), rows)


def _plan_table(plans: Sequence[tuple[PlanRecord, bool, str]]) -> RenderableType:
    rows = [
        [
            record.key.graph,
            record.key.precision,
            ", ".join(str(profile) for profile in record.key.options.profiles),
            _size(record.plan.size),
            "; ".join(
                [
                    record.runs_on,
                    *([] if current else ["of another graph, never used here"]),
                    *([f"not usable: {fault}"] if fault else []),
                ]
            ),
            record.key.digest[:12],
        ]
        for record, current, fault in plans
    ]
    return table("plans", ("graph", "precision", "batches", "size", "runs on", "plan"), rows)


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
