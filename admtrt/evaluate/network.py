"""Feature networks: a graph with a manifest, or a graph alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from admtrt.config_base import Config
from admtrt.config_values import Positive
from admtrt.errors import BundleError, ConfigError, RequestError
from admtrt.files import sha256_of
from admtrt.onnx_wire import external_locations
from admtrt.reading import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence

GRAPH, MANIFEST, SEEN = "features.onnx", "manifest.json", "seen.npy"
"""Files of a feature network's folder; the last holds hashes of a judge's training images."""
POOL, SPATIAL, LOGITS = "pool", "spatial", "logits"
_LARGEST_MANIFEST = 2**20  # bytes
Kind = Literal["inception", "judge", "onnx"]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Weights(Config):
    """The file of a network's weights; ``known`` names it if it is a published one."""

    name: str
    sha256: _Hash
    known: bool


class FeatureManifest(Config):
    """Everything about a feature network except its graph.

    ``image_size`` is None if the graph resizes its input; ``class_names`` belong to ``logits``.
    """

    schema_version: Literal[1] = 1
    kind: Literal["inception", "judge"]
    sha256: _Hash
    weights: Weights
    image_size: Positive | None
    channels: Annotated[int, Field(ge=1, le=3)]
    resize: str
    class_names: tuple[str, ...] = ()
    made_with: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class FeatureNetwork:
    """A network on disk.

    Attributes:
        name: its name in tables and results.
        kind: kind of network; ``onnx`` for a graph without a manifest.
        graph: its file.
        digest: SHA-256 of the graph and its external weights.
        manifest: None for a graph alone.
        folder: its folder; None for a graph alone.
    """

    name: str
    kind: Kind
    graph: Path
    digest: str
    manifest: FeatureManifest | None = None
    folder: Path | None = None

    @property
    def published(self) -> bool:
        """True if the weights are published ones."""
        return self.manifest is not None and self.manifest.weights.known


def open_network(text: str) -> FeatureNetwork:
    """Open the network of ``--features``: a folder of `admtrt evaluate features`, or ``NAME=FILE.onnx``.

    Raises:
        RequestError: if it is neither.
        BundleError: if the folder is incomplete or altered, or the file is not a graph.
    """
    name, equals, file = text.partition("=")
    if equals and name and not Path(text).exists():
        return _foreign(name, Path(file))
    folder = Path(text)
    if folder.suffix == ".onnx" or folder.is_file():
        raise RequestError(
            f"features {text!r} are a file without a name", hint=f"Write --features NAME={text} instead."
        )
    manifest = _read_manifest(folder)
    graph = folder / GRAPH
    digest = _digest(graph)
    if digest != manifest.sha256:
        raise BundleError(
            f"{graph} is not the file that {folder / MANIFEST} describes",
            hint="Make the features again with admtrt evaluate features.",
        )
    return FeatureNetwork(manifest.kind, manifest.kind, graph, digest, manifest, folder)


def open_networks(texts: Sequence[str]) -> list[FeatureNetwork]:
    """Open all requested networks, with different names.

    Raises:
        RequestError: if two have the same name; else as :func:`open_network`.
    """
    networks = [open_network(text) for text in texts]
    for index, network in enumerate(networks):
        if any(network.name == other.name for other in networks[:index]):
            raise RequestError(
                f"two features are called {network.name!r}", hint="Give each its own name, or ask for one."
            )
    return networks


def _read_manifest(folder: Path) -> FeatureManifest:
    file = folder / MANIFEST
    try:
        data = read_json(file, _LARGEST_MANIFEST)
    except OSError as error:
        raise RequestError(
            f"{folder} is no folder of features: cannot read {file.name}: {error.strerror}",
            hint="Make one with admtrt evaluate features, or name a graph: NAME=FILE.onnx.",
        ) from None
    except ValueError:
        raise BundleError(f"{file} is damaged: it is no JSON") from None
    if not isinstance(data, dict):
        raise BundleError(f"{file} is damaged: it holds no object")
    try:
        return FeatureManifest.from_dict(data, source=str(file))
    except ConfigError as error:
        raise BundleError(error.message) from None


def _foreign(name: str, graph: Path) -> FeatureNetwork:
    if not name.replace("_", "").replace("-", "").isalnum():
        raise RequestError(f"the features' name {name!r} has signs other than letters, digits, - and _")
    return FeatureNetwork(name, "onnx", graph, _digest(graph))


def _digest(graph: Path) -> str:
    if not graph.is_file():
        raise RequestError(f"there is no file {graph}", hint="Name an ONNX graph, or a folder of features.")
    others = sorted(external_locations(graph))
    if not others:
        return sha256_of(graph)
    digest = hashlib.sha256(sha256_of(graph).encode())
    for other in others:
        file = graph.parent / other
        if not file.is_file():
            raise BundleError(f"{graph} keeps weights in {other}, which is not there")
        digest.update(sha256_of(file).encode())
    return digest.hexdigest()
