"""Options of ``admtrt sample`` for images to start from and images to condition on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from admtrt.commands.groups import takes_group
from admtrt.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from admtrt.bundle import Manifest
    from admtrt.runtime.guide_targets import GuideTargets
    from admtrt.runtime.image_inputs import ImageInputs
    from admtrt.runtime.latents import Latents
    from admtrt.runtime.pipeline import Pipeline
    from admtrt.runtime.shards import Shards
    from admtrt.runtime.slots import Labels
    from admtrt.schedule.sampler import SamplerChoices, SamplerConfig

_PANEL = "Images as a start and as a frame"
_PARAMETER = "image_options"
_STEPS_BETWEEN = 8  # samples of an interpolation without --num
_FILES = "an .npz (arr_0), an image or a folder; one image serves all samples"


def _option(help_text: str, metavar: str | None = None, *, flag: tuple[str, ...] = ()) -> Any:
    return typer.Option(*flag, help=help_text, metavar=metavar, rich_help_panel=_PANEL)


@dataclass(frozen=True, eq=False)
class ReadImages:
    """The contents of the files that the options name.

    Attributes:
        inputs: the samples' inputs, not yet checked together.
        labels: int64 [N] if a file has labels, else None.
        count: number of samples.
        compared: images to compare the samples with, or None.
    """

    inputs: ImageInputs
    labels: Labels | None
    count: int
    compared: NDArray[Any] | None

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class ImageOptions:
    """The options as given."""

    init: Annotated[Path | None, _option(f"Start from noised images: {_FILES}.", "IMAGES")] = None
    strength: Annotated[
        float | None,
        _option("Of --init: take only the last round(STRENGTH * evaluations); above 0, up to 1."),
    ] = None
    known: Annotated[Path | None, _option(f"Keep known pixels of images: {_FILES}.", "IMAGES")] = None
    mask: Annotated[
        Path | None,
        _option("Of --known: mask of the known pixels: 128 or more in an image, 1 in an .npz.", "PNG|NPZ"),
    ] = None
    jump: Annotated[
        str | None,
        _option("Of --known: jump back L steps until each was reached N times, e.g. 10:10.", "L:N"),
    ] = None
    known_as_sampled: Annotated[
        bool,
        _option(
            "Of --known: keep the networks' output in the known pixels of the result.",
            flag=("--known-as-sampled",),
        ),
    ] = False
    reference: Annotated[Path | None, _option(f"Keep the low frequencies of images: {_FILES}.", "IMAGES")] = (
        None
    )
    low_pass: Annotated[
        str | None,
        _option(
            "Of --reference: keep what survives downsampling by N, down to step UNTIL.",
            "N[:UNTIL]",
        ),
    ] = None
    recurrence: Annotated[
        int | None, _option("Evaluate each noise level N times, adding noise to return to it.", "N")
    ] = None
    latents: Annotated[
        Path | None, _option("Start from latents: latents.npz of admtrt invert, or noise.", "FILE")
    ] = None
    interpolate: Annotated[
        str | None,
        _option(
            f"Interpolate between seeds A and B, or between two rows of --latents: --num samples "
            f"(default {_STEPS_BETWEEN}), ends included.",
            "A:B",
        ),
    ] = None
    difference: Annotated[
        bool,
        _option(
            "Also write |sample - image|, for the images of --init or of inverted --latents.",
            flag=("--difference",),
        ),
    ] = False

    def read(
        self, manifest: Manifest, num: int | None, targets: GuideTargets, *, own_mask: bool
    ) -> ReadImages | None:
        """Read all files that the options name; None if there are none.

        Args:
            manifest: the bundle's manifest.
            num: the number of samples, if given.
            targets: the guides' targets.
            own_mask: whether ``--mask`` belongs to ``--known``; otherwise it is a guide's.

        Raises:
            RequestError: if a file cannot be read, or has the wrong content.
        """
        from admtrt.contract import event_shape
        from admtrt.runtime.image_inputs import ImageInputs, Known
        from admtrt.runtime.images_in import read_images, read_mask

        if own_mask and (self.known is None) != (self.mask is None):
            missing = "--mask" if self.mask is None else "--known"
            raise RequestError(f"--known and --mask belong together; there is no {missing}")
        if self.known_as_sampled and self.known is None:
            raise RequestError(
                "--known-as-sampled is of known pixels, and there are none", hint="Give --known."
            )
        event = event_shape(manifest.network)
        latents = self._latents(manifest, num)
        labels = None if latents is None else latents.labels
        given: dict[str, NDArray[Any] | None] = dict.fromkeys(("init", "known", "reference"))
        for name in given:
            path = getattr(self, name)
            if path is not None:
                given[name], theirs = read_images(path, event, f"--{name}")
                labels = theirs if labels is None else labels
        known = None
        if self.mask is not None and own_mask:
            known = Known(given["known"], read_mask(self.mask, event), self.known_as_sampled)
        inputs = ImageInputs(
            given["init"],
            self.strength,
            known,
            None if self.jump is None else _two_numbers(self.jump, "--jump", "L:N", "10:10"),
            given["reference"],
            None if self.low_pass is None else _low_pass(self.low_pass),
            latents,
            targets,
            self.recurrence,
        ).checked(event)
        compared = given["init"] if latents is None else latents.images
        if self.difference and compared is None:
            raise RequestError(
                "--difference compares samples with the images of --init, or with those that --latents were "
                "inverted from",
                hint="Give --init, or the latents.npz of admtrt invert.",
            )
        if not inputs.lengths:
            return None
        length = max(inputs.lengths.values())
        count = length if num is None or length > 1 else num
        if labels is not None and len(labels) == 1:
            labels = labels.repeat(count)
        if num not in (None, count):
            raise RequestError(f"there are {count} images, --num says {num}", hint="Leave --num out.")
        return ReadImages(inputs, labels, count, compared)

    def choices(self, images: ReadImages | None, given: SamplerChoices) -> SamplerChoices:
        """A sampler's choices, completed by those of an inversion."""
        latents = None if images is None else cast("Latents | None", images.inputs.latents)
        return given if latents is None else latents.choices(given)

    def checked(
        self,
        images: ReadImages | None,
        targets: GuideTargets,
        pipeline: Pipeline,
        sampler: SamplerConfig,
        note: Callable[[str], None],
    ) -> ImageInputs:
        """Check the inputs of a run against its bundle and sampler.

        Raises:
            RequestError: for inputs that these do not support.
        """
        from admtrt.runtime.image_inputs import ImageInputs

        without = ImageInputs(targets=targets, recurrence=self.recurrence)
        inputs = pipeline.check_inputs(sampler, without if images is None else images.inputs)
        if inputs.known is not None:
            note(f"{inputs.known.mask.mean():.1%} of the pixels are known and kept (white of the mask)")
        if self.interpolate is not None:
            schedule = inputs.schedule(pipeline.bundle.manifest.diffusion, sampler)
            if schedule.stochastic.any() or schedule.edits.any():
                raise RequestError(
                    f"{sampler.method} adds noise of each seed on the way, and samples in between would have "
                    "nothing in common",
                    hint="Use a sampler without noise, e.g. --steps ddim50.",
                )
        return inputs

    def differences(
        self, images: ReadImages | None, shards: Shards, directory: Path, *, grid: bool
    ) -> list[str]:
        """Write the files of ``--difference`` for a finished run; does nothing without the option."""
        from admtrt.runtime.difference import write_difference

        if not self.difference or images is None or images.compared is None:
            return []
        return [str(path) for path in write_difference(shards, images.compared, directory, grid=grid)]

    def _latents(self, manifest: Manifest, num: int | None) -> Latents | None:
        """The latents of the file, between two of them, or between those of two seeds."""
        from admtrt.contract import event_shape
        from admtrt.runtime.latents import Latents

        event = event_shape(manifest.network)
        latents = None if self.latents is None else Latents.read(self.latents, event)
        if self.interpolate is None:
            return latents
        first, second = _two_numbers(self.interpolate, "--interpolate", "A:B", "0:1")
        if latents is None:
            latents = Latents.of_seeds([first, second], manifest.network)
            first, second = 0, 1
        return latents.between(first, second, _STEPS_BETWEEN if num is None else num)


takes_image_options = takes_group(ImageOptions, _PARAMETER)
"""Adds the options of :class:`ImageOptions` to a command, as its parameter ``image_options``."""


def _two_numbers(text: str, option: str, form: str, example: str) -> tuple[int, int]:
    """Parse two non-negative whole numbers, ``A:B``."""
    parts = text.split(":")
    if len(parts) != 2 or not all(_is_number(part) for part in parts):
        raise RequestError(
            f"{option} {text[:60]!r} is not of the form {form}", hint=f"Write e.g. {option} {example}."
        )
    return int(parts[0]), int(parts[1])


def _low_pass(text: str) -> int | tuple[int, int]:
    if _is_number(text):
        return int(text)
    return _two_numbers(text, "--low-pass", "N[:UNTIL]", "4:10")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 20
