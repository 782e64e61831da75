"""The bundle: a directory with graphs and a manifest, written atomically and verified when read.

Nothing in a bundle is executed or opened before the manifest's schema, every file's size and SHA-256, every
path (external data of the graphs included) and the graphs' operators have been checked. After a library has
opened a file, it is checked that the file has not changed meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from admtrt.bundle_faults import MANIFEST, no_bundle, refuse_url
from admtrt.config import ClassifierConfig, DiffusionConfig, EdmConfig, ProcessConfig, UNetConfig
from admtrt.config_base import Config, later
from admtrt.config_values import Positive
from admtrt.contract import (
    FURTHER,
    GraphName,
    GraphSpec,
    Precision,
    bundle_specs,
    event_shape,
    further_specs,
)
from admtrt.errors import BundleError, ConfigError, RequestError
from admtrt.files import atomic_directory, sha256_of
from admtrt.memo import FileHashes, Memo, file_identity
from admtrt.onnx_wire import check_operators, external_locations
from admtrt.reading import parse_json, read_small
from admtrt.schedule.guides import LABELLED, WEIGHTS, GuideConfig, GuideName
from admtrt.schedule.process import require_discrete
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import sampling_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

SCHEMA_VERSION: Literal[2] = 2
"""Schema of new bundles. Schema 1 has no graphs for solvers with memory, and calls its network ``unet``."""
_READABLE = (1, 2)
_LARGEST_MANIFEST = 2**24  # bytes
_AGAIN = "Copy the bundle again, or export the checkpoint again."


class FileEntry(Config):
    """Size in bytes and SHA-256 (hexadecimal) of one file."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class GraphEntry(Config):
    """One exported graph: its file, contract and provenance.

    ``operations`` (of products) and ``peak_bytes`` (of activations) are per sample, and given for networks
    only.
    """

    file: str
    spec: GraphSpec
    precision: Precision = "fp32"
    opset: Annotated[int, Field(ge=1)]
    nodes: Annotated[int, Field(ge=0)]
    operations: int | None = later(None)
    peak_bytes: int | None = later(None)


class Manifest(Config):
    """Everything that the runtime needs besides the graphs themselves.

    ``event_shape`` is the shape of one sample, ``threshold_quantile`` the quantile of the graph
    ``threshold``. ``graphs`` are the fp32 graphs in the CPU form; ``engine_graphs`` hold the engine form for
    each exported precision. ``classifier_rescale_timesteps`` is the classifier's unit of t if it differs from
    the UNet's; its graphs take the UNet's unit. ``guides`` are the guides other than the classifier, in the
    order in which the small graphs take them.
    """

    schema_version: Literal[1, 2] = SCHEMA_VERSION
    network: UNetConfig
    event_shape: tuple[Positive, ...] = ()
    threshold_quantile: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    classifier: ClassifierConfig | None = None
    diffusion: ProcessConfig
    sampler: SamplerConfig
    class_names: tuple[str, ...] = ()
    graphs: dict[GraphName, GraphEntry]
    engine_graphs: dict[Precision, dict[GraphName, GraphEntry]] = Field(default_factory=dict)
    files: dict[str, FileEntry]
    made_with: dict[str, str] = Field(default_factory=dict)
    classifier_rescale_timesteps: bool | None = later(None)
    guides: dict[GuideName, GuideConfig] = later({})

    @property
    def num_classes(self) -> int | None:
        """Number of classes to choose from: the UNet's, else the classifier's, else a guide's, else None."""
        if self.network.classes is not None:
            return self.network.classes
        if self.classifier is not None:
            return self.classifier.num_classes
        labelled = (guide for guide in self.guides.values() if guide.loss in LABELLED)
        return next((guide.targets[WEIGHTS][0] for guide in labelled), None)

    @property
    def sampled_graphs(self) -> tuple[GraphName, ...]:
        """The graphs that sampling may run: all except :data:`admtrt.contract.FURTHER`."""
        return tuple(name for name in self.graphs if name not in FURTHER)

    def discrete(self, what: str) -> DiffusionConfig:
        """The process, if it is discrete.

        Raises:
            RequestError: if it is not discrete.
        """
        return require_discrete(self.diffusion, what, "bundle")

    @property
    def recommendation(self) -> str:
        """The recommended sampler, for people."""
        sampler = self.sampler
        interval = sampler.guidance_interval
        steps = sampler.steps or len(sampling_schedule(self.diffusion, sampler.unguided))
        return (
            f"{sampler.method}, steps {steps}, scale {sampler.scale:g}"
            + ("" if interval is None else f" at noise levels from {interval[0]:g} to {interval[1]:g}")
            + "".join(f", {name} {value}" for name, value in sampler.chosen_options.items())
            + {1.0: "", None: ", x_0 not clipped"}.get(sampler.bound, f", x_0 within {sampler.bound}")
        )

    @model_validator(mode="before")
    @classmethod
    def _read_schema_1(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("schema_version") == 1 and "unet" in data:
            return {"network" if name == "unet" else name: value for name, value in data.items()}
        return data

    @model_validator(mode="after")
    def _check_agreement(self) -> Self:
        check_networks(self.network, self.classifier, self.diffusion)
        try:
            sampling_schedule(self.diffusion, self.sampler.unguided)
        except RequestError as error:
            raise ValueError(f"the recommended sampler's {error.message}") from None
        event = event_shape(self.network)
        if self.schema_version > 1 and self.event_shape != event:
            raise ValueError(f"event_shape is {list(self.event_shape)}, expected {list(event)}")
        self._check_guides()
        specs = bundle_specs(self.network, self.classifier, self.guides, schema=self.schema_version)
        further = further_specs(self.network)
        for where, graphs in (("graphs", self.graphs), *self.engine_graphs.items()):
            if set(graphs) - set(further if where == "graphs" else ()) != set(specs):
                raise ValueError(f"{where} are {sorted(graphs)}, expected {sorted(specs)}")
            for name, graph in graphs.items():
                self._check_graph(f"{where}: '{name}'", graph, (specs | further)[name])
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes")
        return self

    def _check_guides(self) -> None:
        if self.guides and self.schema_version < 2:
            raise ValueError("a bundle of schema 1 has no guides")
        check_references(self.network, self.guides)

    def _check_graph(self, what: str, graph: GraphEntry, spec: GraphSpec) -> None:
        if graph.spec != spec:
            raise ValueError(f"{what} declares other inputs or outputs than its network has")
        if graph.file not in self.files:
            raise ValueError(f"{what} names the file '{graph.file}', which is not listed")


def check_references(network: UNetConfig, guides: Mapping[str, GuideConfig]) -> None:
    """Refuse a reference network for other images or classes than the UNet's, or without a null class.

    Args:
        network: the UNet.
        guides: guides of any kind, by name.

    Raises:
        ValueError: naming what differs.
    """
    for name, guide in guides.items():
        if guide.kind != "reference":
            continue
        if guide.network is None and network.null_class is None:
            raise ValueError(f"guide '{name}' needs a null class, and the network has none")
        for field in (
            () if guide.network is None else ("image_size", "in_channels", "classes", "low_res_size")
        ):
            ours, theirs = getattr(network, field), getattr(guide.network, field)
            if ours != theirs and not (field == "classes" and theirs is None):
                raise ValueError(f"the UNet has {field} {ours} but the reference '{name}' {theirs}")


def check_networks(
    unet: UNetConfig, classifier: ClassifierConfig | None, diffusion: DiffusionConfig | EdmConfig
) -> None:
    """Refuse networks that cannot work together.

    Raises:
        ValueError: naming what differs.
    """
    diffusion.check_variance(unet)
    if classifier is None:
        return
    if isinstance(diffusion, EdmConfig):
        raise ValueError("a process of kind 'edm' takes no noisy classifier")
    for field in ("image_size", "in_channels"):
        ours, theirs = getattr(unet, field), getattr(classifier, field)
        if ours != theirs:
            raise ValueError(f"the UNet has {field} {ours} but the classifier {theirs}")
    if unet.classes is not None and unet.classes != classifier.num_classes:
        more = unet.null_class is None and unet.classes == classifier.num_classes + 1
        raise ValueError(
            f"the UNet has {unet.classes} classes but the classifier {classifier.num_classes}"
            + ("; if one of the UNet's means no class, say which (--null-class)" if more else "")
        )


class Bundle:
    """A verified bundle on disk.

    Attributes:
        path: its directory.
        manifest: its manifest.
        digest: SHA-256 of the manifest, hexadecimal. The manifest has every file's hash, so this identifies
            the bundle.
    """

    def __init__(
        self, path: Path, manifest: Manifest, digest: str, verified: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.digest = digest
        self._verified = verified  # the identity of each file when it was hashed

    @classmethod
    def open(cls, path: str | Path, *, memo: bool = True) -> Self:
        """Read and verify a bundle.

        Args:
            path: its directory.
            memo: trust the remembered hash of a file whose size, times and inode have not changed; False
                reads every byte.

        Raises:
            BundleError: naming the file and what differs.
        """
        refuse_url(str(path))
        path = Path(path)
        manifest, digest = _read_manifest(path)
        hashes = FileHashes(Memo("hashes") if memo else None)
        verified = {name: _check_file(path, name, entry, hashes) for name, entry in manifest.files.items()}
        hashes.remember()
        opened = cls(path, manifest, digest, verified)
        for engine, graphs in ((None, manifest.graphs), *manifest.engine_graphs.items()):
            for name, graph in graphs.items():
                with opened.reading(name, engine) as file:
                    _check_external_data(path, name, graph, manifest)
                    check_operators(file)
        return opened

    def graph_entry(self, name: GraphName, engine: Precision | None = None) -> GraphEntry:
        """One graph: the CPU form, or the engine form of a precision.

        Raises:
            BundleError: if the bundle has no such graph.
        """
        manifest = self.manifest
        if engine is not None and engine not in manifest.engine_graphs:
            held = ", ".join(manifest.engine_graphs) or "none"
            raise BundleError(
                f"{self.path} has no engine graphs in {engine}; it has {held}",
                hint=f"Export the checkpoint again with: --engine {engine}",
            )
        graphs = manifest.graphs if engine is None else manifest.engine_graphs[engine]
        if name not in graphs:
            raise BundleError(
                f"{self.path} has no graph '{name}'"
                + ("" if engine is None else f" for engines in {engine}"),
                hint="Export the checkpoint again with: --likelihood"
                if name == "unet_vector_jacobian"
                else "",
            )
        return graphs[name]

    def graph_path(self, name: GraphName, engine: Precision | None = None) -> Path:
        """Path of one graph, see :meth:`graph_entry`."""
        return self.path / self.graph_entry(name, engine).file

    def with_engine(self, engine: Precision) -> Self:
        """The same bundle with its engine graphs of a precision in place of the CPU graphs.

        Raises:
            BundleError: if it has none.
        """
        self.graph_entry("unet", engine)
        graphs = self.manifest.engine_graphs[engine]
        manifest = self.manifest.model_copy(update={"graphs": graphs})
        return type(self)(self.path, manifest, self.digest, self._verified)

    @contextlib.contextmanager
    def reading(self, name: GraphName, engine: Precision | None = None) -> Iterator[Path]:
        """Context in which to open the file of one graph (see :meth:`graph_entry`) and its weights.

        Raises:
            BundleError: at the end, if a file of the bundle has changed since it was verified.
        """
        yield self.graph_path(name, engine)
        for file, identity in self._verified.items():
            try:
                same = file_identity(_inside(self.path, file)) == identity
            except OSError:
                same = False
            if not same:
                raise BundleError(
                    f"{self.path}: '{file}' was replaced or changed while the bundle was being opened",
                    hint="Repeat the command when nothing writes there any more.",
                )

    def graph_files(self, entry: GraphEntry) -> list[str]:
        """The files of a graph and its external weights, as listed in the manifest."""
        folder = PurePosixPath(entry.file).parent
        weights = sorted(external_locations(self.path / entry.file))
        return [entry.file, *((folder / name).as_posix() for name in weights)]


def _read_manifest(path: Path) -> tuple[Manifest, str]:
    """Read the manifest; its SHA-256 is of the same bytes."""
    file = path / MANIFEST
    resolved = _followed(path, file)
    if resolved is None:
        raise BundleError(f"{file} is a link out of the bundle", hint=_AGAIN)
    try:
        content = read_small(resolved, _LARGEST_MANIFEST)
        data: Any = parse_json(content)
    except (FileNotFoundError, NotADirectoryError):
        raise no_bundle(path) from None
    except OSError as error:
        raise BundleError(f"cannot read {file}: {error.strerror}", hint=_AGAIN) from None
    except ValueError as error:  # bad JSON, bad UTF-8, absurdly long numbers
        raise BundleError(f"{file} is not valid JSON: {error}", hint=_AGAIN) from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version not in _READABLE or isinstance(version, bool):
        raise BundleError(
            f"{file} has schema_version {version!r}; this admtrt reads {' and '.join(map(str, _READABLE))}",
            hint="Export the checkpoint again, or install the version of admtrt that wrote the bundle.",
        )
    try:
        return Manifest.from_dict(data, source=str(file)), hashlib.sha256(content).hexdigest()
    except ConfigError as error:
        raise BundleError(error.message, hint=_AGAIN) from None


def _inside(path: Path, name: str) -> Path:
    """Resolve a relative name in a manifest to its file.

    Raises:
        BundleError: if the path leaves the bundle by "..", an absolute path or a link.
    """
    relative = PurePosixPath(name)
    plain = bool(name) and not relative.is_absolute() and ".." not in relative.parts and "\\" not in name
    if plain and name.isprintable():
        resolved = _followed(path, path / relative)
        if resolved is not None:
            return resolved
    raise BundleError(f"{path}: the manifest names {name!r}, which lies outside the bundle")


def _followed(path: Path, file: Path) -> Path | None:
    """The file that links lead to; None if it lies outside the bundle."""
    root, resolved = Path(os.path.realpath(path)), Path(os.path.realpath(file))
    return resolved if resolved.is_relative_to(root) and resolved != root else None


def _check_file(path: Path, name: str, entry: FileEntry, hashes: FileHashes) -> str:
    """Check one file. Returns its identity before it was read."""
    file = _inside(path, name)
    try:
        if not file.is_file():
            raise BundleError(f"{path}: the file '{name}' is missing", hint=_AGAIN)
        size = file.stat().st_size
        if size != entry.size:
            raise BundleError(
                f"{path}: '{name}' has {size} bytes, the manifest says {entry.size}", hint=_AGAIN
            )
        digest, identity = hashes(file)
    except OSError as error:
        raise BundleError(f"{path}: cannot read '{name}': {error.strerror}", hint=_AGAIN) from None
    if digest != entry.sha256:
        raise BundleError(
            f"{path}: '{name}' has SHA-256 {digest[:12]}..., the manifest says {entry.sha256[:12]}...",
            hint=_AGAIN,
        )
    return identity


def _check_external_data(path: Path, name: str, graph: GraphEntry, manifest: Manifest) -> None:
    file = _inside(path, graph.file)
    for location in external_locations(file):
        target = (PurePosixPath(graph.file).parent / location).as_posix()
        beside = "/" not in location  # no folders: some path forms are read as memory addresses
        if not beside or target not in manifest.files or _inside(path, target).parent != file.parent:
            raise BundleError(
                f"{path}: graph '{name}' keeps weights in {location!r}, which is not a file of the bundle",
                hint="Do not run it: its weights would come from elsewhere.",
            )


def write_bundle(
    path: Path,
    write_graphs: Callable[[Path], Mapping[GraphName, GraphEntry]],
    fields: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> Bundle:
    """Write a bundle atomically: a reader sees the old one or the new one.

    Args:
        path: the directory to create.
        write_graphs: writes the graphs' files into the directory it is given and describes them.
        fields: the remaining fields of the manifest, without ``files`` and ``graphs``.
        overwrite: replace an existing bundle.

    Raises:
        BundleError: if the path exists and is not a bundle.
        ConfigError: if the fields do not fit together.
        OutputError: if the path exists or cannot be written.
    """
    if overwrite and path.exists() and not (path / MANIFEST).is_file():
        raise BundleError(
            f"{path} exists and is not a bundle; it is not overwritten", hint="Choose another place."
        )
    with atomic_directory(path, overwrite=overwrite) as temporary:
        graphs = write_graphs(temporary)
        files = {
            file.relative_to(temporary).as_posix(): FileEntry(
                size=file.stat().st_size, sha256=sha256_of(file)
            )
            for file in sorted(temporary.rglob("*"))
            if file.is_file()
        }
        manifest = Manifest.from_dict({"graphs": dict(graphs), "files": files, **fields}, source="the bundle")
        content = (json.dumps(manifest.to_dict(), indent=1, ensure_ascii=False) + "\n").encode()
        (temporary / MANIFEST).write_bytes(content)
        _write_out(temporary)
    return Bundle(path, manifest, hashlib.sha256(content).hexdigest())


def _write_out(folder: Path) -> None:
    """Sync files to the disk before their folder is renamed."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
