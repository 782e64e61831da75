"""Bundles for tests: fake ones with empty graphs, and tiny exported ones, each made once per run."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock
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
EMPTY_GRAPH = b"\x08\x0a"  # a model that contains only its IR version


def sham_bundle(
    path: Path,
    *,
    overwrite: bool = False,
    graph: bytes = EMPTY_GRAPH,
    extra: Mapping[str, bytes] = MappingProxyType({}),
    **fields: Any,
) -> Bundle:
    """A fake bundle that passes every check of the format but cannot run.

    The file of every graph contains ``graph``; ``extra`` are further files; ``fields`` replace fields of the
    manifest.
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
    """The folder of this run's workers, see ``conftest.py``; outside of pytest one of this process."""
    shared = os.environ.get("ADMTRT_TESTS_SHARED")
    if shared is not None:
        return Path(shared)
    directory = tempfile.TemporaryDirectory(prefix="admtrt-tests-")
    atexit.register(directory.cleanup)
    return Path(directory.name)


def network(config: UNetConfig | ClassifierConfig, **fields: Any) -> LoadedNetwork:
    """A network with the goldens' weights, in the form of a loaded checkpoint."""
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
    """One of four exported bundles, by name.

    ``guided`` is unconditional with a classifier of 3 classes; ``steered`` is the same with four more guides.
    ``conditional`` (4 classes) and ``upsampler`` (from 4x4) have no classifier.
    """
    path = _root() / name
    with FileLock(f"{path}.lock"):
        if not path.exists():
            _export(name, path)
    return path


def _export(name: str, path: Path) -> None:
    unet, classifier = _NETWORKS[name]
    names = CLASS_NAMES if classifier is not None else ()
    bundle_from_checkpoints(
        network(unet, class_names=names),
        None if classifier is None else network(classifier),
        path,
        guides=guides() if name == "steered" else (),
    )


def guides() -> list[AnyGuide]:
    """Guides: losses with and without an image as target, one of labels and x_t, and a second network."""
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
    """Edit the data of a bundle's manifest in its file."""
    file = bundle / "manifest.json"
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


def replace_graph(bundle: Path, name: str, content: bytes) -> None:
    """Replace a graph and its recorded hash and size: tampering that no hash detects."""
    file = f"{name}.onnx"
    (bundle / file).write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(bundle, lambda data: data["files"].update({file: entry}))


def manifest_of(path: Path) -> dict[str, Any]:
    """The data of a bundle's manifest file."""
    data: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    return data


def refusal(path: Path, data: Any = None) -> BundleError:
    """The error of opening a bundle, after replacing its manifest by ``data`` if given."""
    if data is not None:
        (path / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    assert caught.value.exit_code == 2
    return caught.value
