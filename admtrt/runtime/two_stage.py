"""Two stages: a bundle draws small images, an upsampler's bundle enlarges them.

The first stage's images are rounded to uint8 before they are enlarged, as if each stage ran separately and
the images went through a file. Both stages use the same seeds but draw different noise (see
:mod:`admtrt.runtime.noise`). Each stage draws the same noise as when it runs separately.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, Unpack

from admtrt.brief import listed
from admtrt.errors import RequestError
from admtrt.runtime.bulk import LOW_STAGE, check_run, draw, open_graphs
from admtrt.runtime.image_inputs import NOTHING
from admtrt.runtime.pipeline import DEFAULT_BATCH, Pipeline
from admtrt.runtime.shards import Shards

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from admtrt.bundle import Bundle
    from admtrt.runtime.bulk import BulkRequest, Elsewhere, Format
    from admtrt.runtime.drawn import Samples, Step
    from admtrt.runtime.slots import Labels
    from admtrt.schedule.sampler import SamplerChoices, SamplerConfig

UNGUIDED = 0.0
"""The second stage's default scale: the paper guides the small images only ("Comparison to Upsampling")."""


@dataclass(frozen=True, eq=False)
class TwoStageSamples:
    """Samples of both stages: the small images, and the same enlarged."""

    low: Samples
    high: Samples

    @property
    def images(self) -> NDArray[np.uint8]:
        """The enlarged images, uint8 [N, H, W, C]."""
        return self.high.images

    @property
    def labels(self) -> Labels | None:
        """Labels of the stage that is class-conditional, int64 [N]; None if neither is."""
        return self.high.labels if self.low.labels is None else self.low.labels

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each sample."""
        return self.high.seeds


class TwoStage:
    """Sampling from two bundles.

    Args:
        low: pipeline that draws the small images.
        high: pipeline of an upsampler of images of that size.

    Raises:
        RequestError: if the two are incompatible.
    """

    def __init__(self, low: Pipeline, high: Pipeline) -> None:
        check_stages(low.bundle, high.bundle)
        self.low = low
        self.high = high

    @classmethod
    def from_bundles(cls, low: str | Path, high: str | Path, **options: Any) -> Self:
        """Open both bundles. The options are those of :meth:`Pipeline.from_bundle`."""
        return cls(Pipeline.from_bundle(low, **options), Pipeline.from_bundle(high, **options))

    def __call__(
        self,
        labels: Sequence[int | str] | None = None,
        seeds: Sequence[int] | None = None,
        *,
        upsample_steps: str | int | None = None,
        upsample_scale: float = UNGUIDED,
        batch_size: int = DEFAULT_BATCH,
        callback: Callable[[Step], None] | None = None,
        **choices: Unpack[SamplerChoices],
    ) -> TwoStageSamples:
        """Draw one sample for each label and seed.

        Args:
            labels, seeds: as for :class:`Pipeline`; passed to every stage that uses them.
            upsample_steps, upsample_scale: steps and guidance scale of the second stage. Its other choices
                are its bundle's recommendation.
            batch_size: samples computed at once.
            callback: called after every evaluation: first for all samples in the first stage, then in the
                second.
            choices: choices of the first stage, as for :meth:`Pipeline.sampler`.

        Raises:
            RequestError: for any request that the bundles cannot serve, before the first step is taken.
        """
        sampler = self.low.sampler(**choices)
        upsampler = self.high.sampler(steps=upsample_steps, scale=upsample_scale)
        checked = self.low.check_labels(labels, sampler)
        numbers = None if checked is None else checked.tolist()  # the second may have no class names
        for_high = self.labels_of_high(numbers)
        self.high.check_labels(for_high, upsampler)
        low = self.low.draw(sampler, numbers, seeds, batch_size=batch_size, callback=callback)
        high = self.high.draw(
            upsampler, for_high, low.seeds, low_res=low.images, batch_size=batch_size, callback=callback
        )
        return TwoStageSamples(low=low, high=high)

    def labels_of_high(self, labels: Sequence[int] | None) -> Sequence[int] | None:
        """The labels for the second stage: all of them, or None if it is not class-conditional."""
        return None if self.high.bundle.manifest.num_classes is None else labels


def check_stages(low: Bundle, high: Bundle) -> None:
    """Refuse two bundles if the second cannot enlarge the images of the first.

    Raises:
        RequestError: its message names the difference.
    """
    ours, theirs = low.manifest, high.manifest
    if ours.network.low_res_size is not None:
        raise RequestError(
            f"{low.path} is an upsampler itself; a first stage draws from noise alone",
            hint="Give it small images with --low-res, and enlarge the result in a further command.",
        )
    if theirs.network.low_res_size is None:
        raise RequestError(
            f"{high.path} is no upsampler", hint="Give a bundle exported from an upsampler for --upsample."
        )
    pairs = (
        ("images of {0}x{0} pixels", ours.network.image_size, theirs.network.low_res_size),
        ("{0} channels", ours.network.in_channels, theirs.network.in_channels),
        ("{0} classes", ours.num_classes, theirs.num_classes),
        ("the classes {0}", *_differing(ours.class_names, theirs.class_names)),
    )
    for text, drawn, enlarged in pairs:
        if drawn and enlarged and drawn != enlarged:
            raise RequestError(
                f"{low.path} draws {text.format(drawn)}; {high.path} enlarges {text.format(enlarged)}",
                hint="Use the upsampler that belongs to the first bundle.",
            )
    if ours.num_classes is None and theirs.network.num_classes is not None:
        raise RequestError(
            f"{high.path} needs the class of every image, and {low.path} knows no classes",
            hint="Draw with the first alone, and give the second its images with --low-res and --classes.",
        )


def _differing(ours: Sequence[str], theirs: Sequence[str]) -> tuple[str, str]:
    """The classes whose names differ between two bundles, by each one's names; empty if one has no names."""
    pairs = [pair for pair in enumerate(zip(ours, theirs, strict=False)) if pair[1][0] != pair[1][1]]
    first, second = ([f"{index} {names[side]}" for index, names in pairs] for side in (0, 1))
    return listed(first), listed(second)


def second_request(
    stages: TwoStage, request: BulkRequest, upsampler: SamplerConfig, out: Path
) -> BulkRequest:
    """The second stage's request, which enlarges the samples of ``request`` in the run directory ``out``.

    Raises:
        RequestError: if the upsampler needs labels and ``request`` has none.
    """
    labels = None if request.labels is None else request.labels.tolist()
    stages.high.check_labels(stages.labels_of_high(labels), upsampler)
    small = Shards(out / LOW_STAGE, request, stages.low.bundle.manifest)
    return replace(request, sampler=upsampler, low_res=small, inputs=NOTHING)


def draw_two_stage(
    stages: TwoStage,
    low: BulkRequest,
    high: BulkRequest,
    directory: Path,
    formats: Sequence[Format],
    *,
    progress: Callable[[int, str], None] = lambda _count, _text: None,
    elsewhere: tuple[Elsewhere | None, Elsewhere | None] = (None, None),
) -> tuple[list[Path], list[Path]]:
    """Draw every missing shard of the first stage, then of the second, and write the results of both.

    ``directory`` is the run directory of the second stage. Its subdirectory ``low/`` is a complete run
    directory of the first stage.

    Args:
        stages: the samplers.
        low, high: the request of each stage; :func:`second_request` makes ``high``.
        directory: the run directory; it is created, or continued if it has the same requests.
        formats: file formats of the results, as for :func:`admtrt.runtime.bulk.draw`.
        progress: called with the sample-steps done and a text, for a progress display.
        elsewhere: for each stage, as for :func:`admtrt.runtime.bulk.draw`.

    Returns:
        The files written: of the first stage, and of the second.

    Raises:
        UserError: as :func:`admtrt.runtime.bulk.draw`. A directory that holds another run, and graphs of the
            second stage that cannot be used, are refused before the first stage starts.
    """
    check_run(stages.high, high, directory)
    if elsewhere[1] is None:
        open_graphs(stages.high, high)
    first = draw(
        stages.low,
        low,
        directory / LOW_STAGE,
        formats,
        progress=lambda count, text: progress(count, f"first stage, {text}"),
        elsewhere=elsewhere[0],
    )
    second = draw(
        stages.high,
        high,
        directory,
        formats,
        class_names=stages.low.bundle.manifest.class_names,
        progress=lambda count, text: progress(count, f"second stage, {text}"),
        elsewhere=elsewhere[1],
    )
    return first, second
