"""Long runs: draw samples into shards that survive a kill, then write the requested formats.

A run directory holds ``request.json`` (what the run draws, so that runs are never mixed), ``shards/`` (each
written whole) and, when every shard is there, the results. A sample's seed is the first seed plus its index,
so a shard can be drawn by any process at any time and is the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from admtrt.errors import ConfigError, OutputError, RequestError
from admtrt.files import TakenError, atomic_file, is_temporary, remove_stale
from admtrt.images import save_grid, to_pillow, usual_columns
from admtrt.reading import read_json
from admtrt.runtime.frames import Frames
from admtrt.runtime.image_inputs import DIGESTS, NOTHING, NUMBERS, TARGETS, digest_of
from admtrt.runtime.pipeline import consecutive_seeds
from admtrt.runtime.request import names_of, whole_number
from admtrt.runtime.shards import Shards
from admtrt.schedule.sampler import SamplerConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from admtrt.runtime.drawn import Samples, Step
    from admtrt.runtime.image_inputs import ImageInputs
    from admtrt.runtime.pipeline import Pipeline
    from admtrt.runtime.slots import Labels

Format = Literal["npz", "png", "grid", "gif"]
MAX_SAMPLES = 10_000_000
"""The most samples of one run: their labels are held in memory."""
GRID_LIMIT = 400
"""The most samples in a grid; more would be unreadable."""
GIF_LIMIT = 16
"""The most samples in a GIF."""
LOW_STAGE = "low"
"""Subfolder of a two-stage run that holds the first stage's run."""
REQUEST, LARGEST_REQUEST = "request.json", 2**26
"""File that describes a run, and its largest size in bytes: earlier versions wrote every label."""
_LATER = {*DIGESTS, *NUMBERS, TARGETS}
"""Keys that a request has only if they were given; a missing key means None."""
_UNSHOWN = {"bundle": "bundle differs", "labels": "labels differ"} | {
    name: f"{name} differs" for name in ("low_res", "images", TARGETS, *DIGESTS)
}
"""Text that messages show in place of hashes and long lists."""


class SmallImages(Protocol):
    """Small images for an upsampler, read a part at a time. A NumPy array is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> NDArray[np.uint8]:
        """Return these rows, uint8 [n, h, w, C]."""
        ...


class Elsewhere(Protocol):
    """A function that has other processes write the shards of a claimed run."""

    def __call__(self, request: BulkRequest, directory: Path, starts: Sequence[int], /) -> Iterable[int]:
        """Yield each of ``starts`` (the first sample of a shard) once its shard is written."""
        ...


@dataclass(frozen=True, eq=False)
class BulkRequest:
    """A run's request.

    Attributes:
        count: samples in all.
        labels: int64 [count], or None; a bundle without classes only stores them with the images.
        first_seed: sample i has the seed ``first_seed + i``.
        sampler: of all samples.
        batch_size, shard_size: samples computed at once, and kept in one file.
        low_res: uint8 [count, h, w, C], conditioning of an upsampler, or None.
        inputs: images to start from or to condition on, either one for all samples or ``count``.

    Raises:
        RequestError: if a size is out of range, or there is not one label and small image for each sample.
    """

    count: int
    labels: Labels | None
    first_seed: int
    sampler: SamplerConfig
    batch_size: int
    shard_size: int
    low_res: SmallImages | None = None
    inputs: ImageInputs = NOTHING

    def __post_init__(self) -> None:
        if not 1 <= whole_number(self.count, "count") <= MAX_SAMPLES:
            raise RequestError(f"{self.count} samples were asked for; expected 1 to {MAX_SAMPLES}")
        for name in ("batch_size", "shard_size"):
            if whole_number(getattr(self, name), name) < 1:
                raise RequestError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("labels", "low_res"):
            given = getattr(self, name)
            if given is not None and len(given) != self.count:
                raise RequestError(f"{len(given)} {name} for {self.count} samples; give one for each")


def draw(
    pipeline: Pipeline,
    request: BulkRequest,
    directory: Path,
    formats: Sequence[Format],
    *,
    class_names: Sequence[str] = (),
    progress: Callable[[int, str], None] = lambda _count, _text: None,
    elsewhere: Elsewhere | None = None,
) -> list[Path]:
    """Draw every missing shard, then write the results; returns the files written.

    Args:
        pipeline: the sampler.
        request: what to draw.
        directory: the run directory; created, or continued if it holds the same request.
        formats: ``npz`` (``samples.npz``, the original's format), ``png`` (a file for each sample), ``grid``
            (``grid.png``, labelled), ``gif`` (``steps.gif``: the first 16, drawn again step by step).
        class_names: names of the labels, if the bundle has none.
        progress: called with the sample-steps done and a text, for a progress display.
        elsewhere: lets other processes write the shards; None draws them in this process.

    Raises:
        OutputError: if the directory holds another run or a damaged shard, or cannot be written.
        RequestError: if the bundle cannot draw the request.
        BundleError: if a graph cannot be used; the directory is then as it was.
    """
    # Check before claiming the directory. All images have the size of the first.
    pipeline.check_low_res(None if request.low_res is None else request.low_res[:1])
    request = replace(request, inputs=pipeline.check_inputs(request.sampler, request.inputs))
    for name, length in request.inputs.lengths.items():
        if length not in (1, request.count):
            raise RequestError(f"{length} {name} for {request.count} samples; give one, or one for each")
    consecutive_seeds(request.first_seed, request.count)
    if elsewhere is None:
        open_graphs(pipeline, request)
    claim(directory, _identity(pipeline, request))
    shards = Shards(directory, request, pipeline.bundle.manifest)
    if elsewhere is None:
        for start, stop in shards.missing():
            shards.write(start, draw_shard(pipeline, request, start, stop, progress))
    else:
        missing = dict(shards.missing())
        steps = len(request.inputs.schedule(pipeline.bundle.manifest.diffusion, request.sampler))
        for start in elsewhere(request, directory, list(missing)):
            progress((missing[start] - start) * steps, "shards of all machines")
    names = pipeline.bundle.manifest.class_names or class_names
    return [
        _write_gif(directory / "steps.gif", pipeline, request, names, progress)
        if one == "gif"
        else _write(directory, one, request, shards, names)
        for one in formats
    ]


def open_graphs(pipeline: Pipeline, request: BulkRequest) -> None:
    """Open the graphs that a run needs, see :meth:`Pipeline.open_graphs`."""
    pipeline.open_graphs(request.inputs.schedule(pipeline.bundle.manifest.diffusion, request.sampler))


def sample_steps(pipeline: Pipeline, request: BulkRequest, formats: Sequence[Format]) -> int:
    """Sample-steps of a whole run, for a progress display. Samples shown in a GIF count twice."""
    shown = min(GIF_LIMIT, request.count) if "gif" in formats else 0
    schedule = request.inputs.schedule(pipeline.bundle.manifest.diffusion, request.sampler)
    return (request.count + shown) * len(schedule)


def recorded_shard_size(directory: Path) -> int | None:
    """Shard size of the run, or of the first stage, that began in a directory; None if none did."""
    for place in (directory, directory / LOW_STAGE):
        with contextlib.suppress(OSError, ValueError):
            size = _settings(read_json(place / REQUEST, LARGEST_REQUEST)).get("shard_size")
            if type(size) is int and 1 <= size <= MAX_SAMPLES:
                return size
    return None


def check_run(pipeline: Pipeline, request: BulkRequest, directory: Path) -> None:
    """Refuse a directory in which a run can neither begin nor continue, before its small images are known.

    Raises:
        OutputError: if it holds another run, or something else.
    """
    identity = _identity(pipeline, replace(request, low_res=None))
    del identity["low_res"]
    _check_run(directory, identity)


def _identity(pipeline: Pipeline, request: BulkRequest) -> dict[str, Any]:
    """Everything that determines the images and their division into shards."""
    return {
        "bundle": pipeline.bundle.digest,
        "count": request.count,
        "labels": None if request.labels is None else digest_of(request.labels),
        "first_seed": request.first_seed,
        "sampler": request.sampler.to_dict(),
        "shard_size": request.shard_size,
        "computed": pipeline.computed,
        "low_res": None if request.low_res is None else digest_of(request.low_res),
        **request.inputs.identity,
    }


def claim(directory: Path, identity: dict[str, Any]) -> None:
    """Start a run directory, or check that it holds this run. Safe against concurrent starts.

    Raises:
        OutputError: if it holds another run or something else.
    """
    if not _check_run(directory, identity):
        with contextlib.suppress(TakenError), atomic_file(directory / REQUEST, replace=False) as temporary:
            temporary.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        _check_run(directory, identity)
    remove_stale(directory)


def _check_run(directory: Path, identity: dict[str, Any]) -> bool:
    """True if a directory already holds this run, False if the run can begin there."""
    file = directory / REQUEST
    if not os.path.lexists(file):
        if directory.exists() and (not directory.is_dir() or not _is_unclaimed(directory)):
            raise OutputError(
                f"{directory} exists and holds no {identity.get('kind', 'sampling')} run",
                hint="Choose an empty or new directory for --out.",
            )
        return False
    try:
        known = read_json(file, LARGEST_REQUEST)
    except OSError as error:
        raise OutputError(
            f"cannot read {file}: {error.strerror}", hint="Choose another directory for --out."
        ) from None
    except ValueError:
        known = None
    old, new = _settings(known), _settings(identity)
    kind = new.get("kind")
    if old and old.get("kind") != kind:
        raise OutputError(
            f"{directory} holds a run of {'sampling' if kind else 'inversion'}",
            hint="Choose another directory for --out.",
        )
    if not new.keys() - _LATER <= old.keys():
        raise OutputError(
            f"{file} is damaged, so the run there cannot be recognised",
            hint="Choose another directory for --out.",
        )
    differing = [
        _difference(key, old.get(key), new.get(key))
        for key in dict.fromkeys([*new, *(key for key in old if key in _LATER)])
        if old.get(key) != new.get(key)
    ]
    if differing:
        raise OutputError(
            f"{directory} holds another run: {', '.join(differing)}",
            hint="Choose another directory for --out, or repeat the request that started it.",
        )
    return True


def _settings(identity: Any) -> dict[str, Any]:
    """Flatten an identity: its sampler's fields beside the others. Empty if it is not an identity."""
    if not isinstance(identity, dict) or not isinstance(identity.get("sampler"), dict):
        return {}
    try:  # options newer than the run get their defaults
        sampler = SamplerConfig.from_dict(identity["sampler"])
        labels = _labels_digest(identity.get("labels"))
    except (ConfigError, TypeError, ValueError, OverflowError):
        return {}
    if not sampler.scale:
        sampler = sampler.unguided  # without guidance, the interval has no effect
    others = {key: value for key, value in identity.items() if key not in ("sampler", "labels")}
    return {**others, "labels": labels, **sampler.model_dump(mode="json")}


def _labels_digest(labels: Any) -> Any:
    """Digest of the labels. Earlier versions wrote the whole list."""
    return digest_of(np.array(labels, dtype=np.int64)) if isinstance(labels, list) else labels


def _difference(key: str, old: Any, new: Any) -> str:
    return _UNSHOWN.get(key) or f"{key} is {old!r} there and {new!r} now"


def _is_unclaimed(directory: Path) -> bool:
    """True if a directory holds at most a first stage or the remains of a killed claim."""
    return all(
        is_temporary(path.name) or (path.name == LOW_STAGE and path.is_dir()) for path in directory.iterdir()
    )


def draw_shard(
    pipeline: Pipeline,
    request: BulkRequest,
    start: int,
    stop: int,
    progress: Callable[[int, str], None] = lambda _count, _text: None,
) -> NDArray[np.uint8]:
    """Samples ``start`` to ``stop`` of a checked request, uint8 [n, H, W, C]."""

    def after_step(step: Step) -> None:
        progress(step.count, f"step {step.index}/{step.total}")

    return _drawn(pipeline, request, start, stop, after_step).images


def _drawn(
    pipeline: Pipeline, request: BulkRequest, start: int, stop: int, callback: Callable[[Step], None]
) -> Samples:
    labels = None if request.labels is None else request.labels[start:stop]
    return pipeline.draw(
        request.sampler,
        None if labels is None or pipeline.bundle.manifest.num_classes is None else labels.tolist(),
        [request.first_seed + index for index in range(start, stop)],
        low_res=None if request.low_res is None else request.low_res[start:stop],
        inputs=request.inputs.part(slice(start, stop)),
        batch_size=request.batch_size,
        callback=callback,
    )


def _write(
    directory: Path, kind: Format, request: BulkRequest, shards: Shards, class_names: Sequence[str]
) -> Path:
    if kind == "npz":
        return _write_npz(directory / "samples.npz", request, shards)
    if kind == "png":
        return _write_png(directory / "png", request, shards)
    path = directory / "grid.png"
    images = shards[:GRID_LIMIT]
    names = _names(request, len(images), class_names)
    save_grid(images, path, columns=usual_columns(len(images), names), labels=names)
    return path


def _names(request: BulkRequest, count: int, class_names: Sequence[str]) -> list[str] | None:
    """Names of the first samples' classes."""
    return None if request.labels is None else names_of(request.labels[:count], class_names)


def _write_gif(
    path: Path,
    pipeline: Pipeline,
    request: BulkRequest,
    class_names: Sequence[str],
    progress: Callable[[int, str], None],
) -> Path:
    frames, count = Frames(), min(GIF_LIMIT, request.count)

    def after_step(step: Step) -> None:
        frames(step)
        progress(step.count, f"steps.gif, step {step.index}/{step.total}")

    _drawn(pipeline, request, 0, count, after_step)
    frames.save(path, _names(request, count, class_names))
    return path


def _write_npz(path: Path, request: BulkRequest, shards: Shards) -> Path:
    """``arr_0`` uint8 [N, H, W, C] and ``arr_1`` int64 [N], streamed, so that they need not fit in memory."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (request.count, *shards.image_shape)}
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for images in shards.images():
                member.write(images.tobytes())
        if request.labels is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, request.labels)
    return path


def _write_png(folder: Path, request: BulkRequest, shards: Shards) -> Path:
    """One file for each sample, ``<class>_<index>.png``: the original's naming, ready to train on."""
    remove_stale(folder)
    index = 0
    for images in shards.images():
        for image in images:
            prefix = "" if request.labels is None else f"{request.labels[index]}_"
            file = folder / f"{prefix}{index:06d}.png"
            if not file.exists():
                with atomic_file(file, sweep=False) as temporary:
                    to_pillow(image).save(temporary, format="PNG")
            index += 1
    return folder
