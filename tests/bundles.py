"""Bundles for tests: sham ones, whose graphs are empty, and tiny exported ones, each made once a process."""

from __future__ import annotations

import atexit
import hashlib
import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest
from goldens import generated_weights

from admtrt.bundle import MANIFEST, Bundle, GraphEntry, write_bundle
from admtrt.config import ClassifierConfig, DiffusionConfig, UNetConfig
from admtrt.contract import GraphName, bundle_specs, event_shape
from admtrt.errors import BundleError
from admtrt.export.guides import classifiers, losses
from admtrt.export.guides.guide import AnyGuide, Reference
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.models.checkpoint import CheckpointConfig, LoadedNetwork, build_network
from admtrt.runtime.pipeline import Pipeline
from admtrt.schedule.sampler import SamplerConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

_SHAPE = {
    "image_size": 8,
    "in_channels": 1,
    "model_channels": 32,
    "channel_mult": (1,),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "num_heads": 2,
}
UNET = UNetConfig.from_dict(_SHAPE)
CLASSIFIER = ClassifierConfig.from_dict(_SHAPE | {"num_classes": 3, "num_head_channels": 16})
CLASS_NAMES = ("ant", "bee", "cat")
SAMPLER = SamplerConfig(steps="5", scale=2.0)
EMPTY_GRAPH = b"\x08\x0a"  # a model that says its IR version and nothing else


def sham_bundle(
    path: Path,
    *,
    overwrite: bool = False,
    graph: bytes = EMPTY_GRAPH,
    extra: Mapping[str, bytes] = MappingProxyType({}),
    **fields: Any,
) -> Bundle:
    """A bundle that passes every check and cannot run.

    Every graph's file holds ``graph``, ``extra`` are further files, ``fields`` replace those of the manifest.
    """
    given = {
        "network": UNET,
        "classifier": CLASSIFIER,
        "diffusion": DiffusionConfig(),
        "sampler": SAMPLER,
        "class_names": CLASS_NAMES,
        "guides": {},
    } | fields
    given["event_shape"] = event_shape(given["network"])

    def write_graphs(directory: Path) -> dict[GraphName, GraphEntry]:
        for file, content in extra.items():
            (directory / file).parent.mkdir(exist_ok=True)
            (directory / file).write_bytes(content)
        entries: dict[GraphName, GraphEntry] = {}
        for name, spec in bundle_specs(given["network"], given["classifier"], given["guides"]).items():
            (directory / f"{name}.onnx").write_bytes(graph)
            entries[name] = GraphEntry(file=f"{name}.onnx", spec=spec, opset=18, nodes=0)
        return entries

    return write_bundle(path, write_graphs, given, overwrite=overwrite)


@cache
def _root() -> Path:
    directory = tempfile.TemporaryDirectory(prefix="admtrt-tests-")
    atexit.register(directory.cleanup)
    return Path(directory.name)


def network(config: UNetConfig | ClassifierConfig, **fields: Any) -> LoadedNetwork:
    """A network with the weights of the goldens, as if it were loaded from a checkpoint."""
    if isinstance(config, ClassifierConfig):
        fields |= {"kind": "classifier", "classifier": config}
    else:
        fields |= {"kind": "upsampler" if config.low_res_size else "unet", "unet": config}
    checkpoint = CheckpointConfig(**{"diffusion": DiffusionConfig(), "sampler": SAMPLER} | fields)
    module = build_network(checkpoint)
    generated_weights(module)
    return LoadedNetwork(module=module, config=checkpoint)


_NETWORKS: dict[str, tuple[UNetConfig, ClassifierConfig | None]] = {
    "guided": (UNET, CLASSIFIER),
    "steered": (UNET, CLASSIFIER),
    "conditional": (UNetConfig.from_dict(_SHAPE | {"num_classes": 4}), None),
    "upsampler": (UNetConfig.from_dict(_SHAPE | {"low_res_size": 4}), None),
}


@cache
def exported_bundle(name: str) -> Path:
    """One of four.

    ``guided`` is unconditional with a classifier of 3 classes, ``steered`` the same with four guides more;
    ``conditional`` (4 classes) and ``upsampler`` (from 4x4) have none.
    """
    unet, classifier = _NETWORKS[name]
    names = CLASS_NAMES if classifier is not None else ()
    path = _root() / name
    bundle_from_checkpoints(
        network(unet, class_names=names),
        None if classifier is None else network(classifier),
        path,
        guides=_guides() if name == "steered" else (),
    )
    return path


def _guides() -> list[AnyGuide]:
    """Losses with images and without targets, one of labels and noisy images, and a second network."""
    event = event_shape(UNET)
    return [
        replace(losses.linear(event), name="linear"),
        replace(losses.total_variation(event), name="tv"),
        replace(classifiers.noisy([network(CLASSIFIER).module], 3), name="noisy"),
        Reference("weak", network(UNetConfig.from_dict(_SHAPE | {"model_channels": 64})).module),
    ]


@cache
def pipeline(name: str) -> Pipeline:
    """The sampler of an exported bundle, on one thread."""
    return Pipeline.from_bundle(exported_bundle(name), threads=1)


def edit_manifest(bundle: Path, edit: Any) -> None:
    """Change the manifest's data."""
    file = bundle / "manifest.json"
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


def replace_graph(bundle: Path, name: str, content: bytes) -> None:
    """Put other bytes in the place of a graph, hash and size included: tampering that no hash shows."""
    file = f"{name}.onnx"
    (bundle / file).write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(bundle, lambda data: data["files"].update({file: entry}))


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest as it stands in its file."""
    data: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    return data


def refusal(path: Path, data: Any = None) -> BundleError:
    """The error of opening a bundle, its manifest replaced by ``data`` where given."""
    if data is not None:
        (path / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    assert caught.value.exit_code == 2
    return caught.value
