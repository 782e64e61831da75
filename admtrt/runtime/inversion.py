"""DDIM inversion: find the latents that DDIM decodes into given images, and measure the error.

A run directory holds ``request.json``, ``shards/`` and, when every shard is there, ``latents.npz``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.contract import event_shape
from admtrt.errors import OutputError, RequestError
from admtrt.files import atomic_file
from admtrt.npz import Header, open_npz, reading_fault
from admtrt.runtime.bulk import claim
from admtrt.runtime.image_inputs import ImageInputs, digest_of
from admtrt.runtime.images_in import as_states, checked_images
from admtrt.runtime.latents import Latents
from admtrt.runtime.request import whole_number
from admtrt.runtime.slots import slots_for
from admtrt.schedule.inversion import inversion_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from admtrt.runtime.drawn import Step
    from admtrt.runtime.pipeline import Pipeline
    from admtrt.runtime.slots import Images, Labels, Slots
    from admtrt.schedule.sampler import SamplerConfig
    from admtrt.schedule.table import SamplingSchedule

DEFAULT_STEPS = "ddim100"
_LARGEST = 1e3  # bound of a latent's values; a valid latent is near standard normal


@dataclass(frozen=True, eq=False)
class InversionRequest:
    """Images to invert, checked against a bundle.

    Attributes:
        pipeline: of the bundle.
        images: uint8 [N, H, W, C] or float32 [N, C, H, W].
        labels: int64 [N] for networks that take them, or None.
        sampler: of the method ddim, unguided.
        schedule: the steps from an image up to x_T.
        batch_size, shard_size: images inverted at once, and kept in one file.
    """

    pipeline: Pipeline
    images: NDArray[Any]
    labels: Labels | None
    sampler: SamplerConfig
    schedule: SamplingSchedule
    batch_size: int
    shard_size: int

    @classmethod
    def checked(
        cls,
        pipeline: Pipeline,
        images: Any,
        labels: Sequence[int | str] | None = None,
        *,
        steps: str | int = DEFAULT_STEPS,
        levels: int | None = None,
        clip: bool = False,
        batch_size: int,
        shard_size: int | None = None,
    ) -> InversionRequest:
        """Make a request and check it against the bundle.

        Args:
            pipeline: of the bundle.
            images: uint8 [N, H, W, C] or float32 [N, C, H, W] in [-1, 1].
            labels: of each image, needed where the UNet is class-conditional.
            steps: DDIM steps, as for sampling.
            levels: number of steps to go up; all but one by default.
            clip: bound x_0 on the way. Where the bound acts, inversion is not exact.
            batch_size: images computed at once.
            shard_size: images kept in one file; a batch by default.

        Raises:
            RequestError: if the bundle cannot do this.
        """
        manifest = pipeline.bundle.manifest
        if manifest.network.low_res_size is not None:
            raise RequestError(
                f"{pipeline.bundle.path} is an upsampler, whose images are not inverted",
                hint="Use the bundle that draws the small images.",
            )
        given = checked_images(images, event_shape(manifest.network), "images")
        process = manifest.discrete("inversion by ddim")
        sampler = pipeline.sampler(method="ddim", steps=steps, eta=0.0, clip=clip, scale=0.0)
        checked_labels = pipeline.check_labels(labels, sampler)
        if checked_labels is not None and len(checked_labels) != len(given):
            raise RequestError(f"{len(checked_labels)} labels for {len(given)} images; give one for each")
        if whole_number(batch_size, "batch_size") < 1:
            raise RequestError(f"batch_size is {batch_size}; expected at least 1")
        count = None if levels is None else whole_number(levels, "levels")
        return cls(
            pipeline,
            given,
            checked_labels,
            sampler,
            inversion_schedule(process, sampler, count),
            batch_size,
            shard_size or batch_size,
        )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def starts(self) -> range:
        """The first image of each shard."""
        return range(0, len(self), self.shard_size)

    def latents(self, x: Images, rows: slice) -> Latents:
        """Make the :class:`Latents` of some of the images."""
        return Latents(
            x=x,
            levels=len(self.schedule),
            steps=self.sampler.steps,
            clip=bool(self.sampler.clip),
            labels=None if self.labels is None else self.labels[rows],
            images=self.images[rows],
        )

    def inverted(self, rows: slice, callback: Callable[[Step], None] | None) -> Images:
        """Invert some of the images: their x_T, float32 [n, C, H, W].

        Raises:
            RequestError: if it is no number, or of no use.
        """
        first, stop, _ = rows.indices(len(self))
        parts = [
            self._batch(slice(start, min(start + self.batch_size, stop)), callback)
            for start in range(first, stop, self.batch_size)
        ]
        return np.concatenate(parts)

    def slots(self, rows: slice) -> Slots:
        """Slots of some of the images, before the first step up."""
        manifest = self.pipeline.bundle.manifest
        images = as_states(self.images[rows])
        return slots_for(
            manifest.network,
            manifest.classifier,
            [self.schedule] * len(images),
            [0] * len(images),
            labels=None if self.labels is None else self.labels[rows],
            guided=False,
            guides=manifest.guides,
            images=images,
        )

    def finished(self, x: Images) -> Images:
        """Check the states after the last evaluation and return them as x_T.

        Raises:
            RequestError: if it is no number, or of no use.
        """
        if not (np.abs(x) <= _LARGEST).all():  # NaN is neither
            raise RequestError(
                f"inversion over steps {self.sampler.steps!r} left the range of states",
                hint="Use more steps, or --clip.",
            )
        return x

    def _batch(self, rows: slice, callback: Callable[[Step], None] | None) -> Images:
        slots = self.slots(rows)
        self.pipeline.drive(slots, rows.start, callback)
        return self.finished(slots.x)

    def decoded(self, x: Images, rows: slice, callback: Callable[[Step], None] | None) -> Images:
        """Decode the latents of some of the images again, float32 [n, C, H, W]."""
        samples = self.pipeline.draw(
            self.sampler,
            None if self.labels is None else self.labels[rows].tolist(),
            inputs=ImageInputs(latents=self.latents(x, rows)),
            batch_size=self.batch_size,
            callback=callback,
        )
        return samples.x

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the latents and their division into shards."""
        return {
            "kind": "inversion",
            "bundle": self.pipeline.bundle.digest,
            "images": digest_of(self.images),
            "labels": None if self.labels is None else digest_of(self.labels),
            "sampler": self.sampler.to_dict(),
            "inverted_levels": len(self.schedule),
            "shard_size": self.shard_size,
            "computed": self.pipeline.computed,
        }


def invert_into(
    request: InversionRequest, directory: Path, progress: Callable[[int, str], None]
) -> tuple[Path, NDArray[np.float32]]:
    """Invert every missing shard, decode it again, and write ``latents.npz``.

    Args:
        request: what to invert.
        directory: the run directory; created, or continued if it holds the same request.
        progress: called with the image-steps done and a text, for a progress display.

    Returns:
        The file, and the mean absolute difference of each decoded image from the given one, float32 [N] in
        units of [-1, 1].

    Raises:
        OutputError: if the directory holds something else or a damaged shard, or cannot be written.
        RequestError: if the latents are too large or not finite.
    """
    claim(directory, request.identity)
    latents, errors = [], []
    for start in request.starts:
        file = directory / "shards" / f"{start:08d}.npz"
        if not file.exists():
            _invert_shard(request, start, file, progress)
        x, error = _read_shard(request, start, file)
        latents.append(x)
        errors.append(error)
    path = directory / "latents.npz"
    request.latents(np.concatenate(latents), slice(None)).save(path)
    return path, np.concatenate(errors)


def finished_images(request: InversionRequest, directory: Path) -> int:
    """Number of images in the shards that a run directory already holds."""
    done = (start for start in request.starts if (directory / "shards" / f"{start:08d}.npz").exists())
    return sum(min(request.shard_size, len(request) - start) for start in done)


def _invert_shard(
    request: InversionRequest, start: int, file: Path, progress: Callable[[int, str], None]
) -> None:
    rows = slice(start, start + request.shard_size)

    def told(way: str) -> Callable[[Step], None]:
        return lambda step: progress(step.count, f"{way}, step {step.index}/{step.total}")

    x = request.inverted(rows, told("up"))
    back = request.decoded(x, rows, told("and back"))
    error = np.abs(back - as_states(request.images[rows])).mean(axis=tuple(range(1, back.ndim)))
    with atomic_file(file) as temporary, temporary.open("wb") as opened:
        np.savez(opened, latents=x, error=error.astype(np.float32))


def _read_shard(request: InversionRequest, start: int, file: Path) -> tuple[Images, NDArray[np.float32]]:
    count = min(request.shard_size, len(request) - start)
    event = event_shape(request.pipeline.bundle.manifest.network)
    expected = {"latents": (count, *event), "error": (count,)}
    again = "Delete it and repeat the command: it alone is computed again."
    try:
        with open_npz(file) as archive:
            for name, shape in expected.items():
                if archive.header(name) != Header(np.dtype(np.float32), shape):
                    raise OutputError(
                        f"the shard {file} is not of this run: {name} is {archive.header(name)}", hint=again
                    )
            return archive.read("latents"), archive.read("error")
    except OutputError:
        raise
    except Exception as error:  # damaged bytes can raise anything
        raise OutputError(f"cannot read the shard {file}: {reading_fault(error)}", hint=again) from error
