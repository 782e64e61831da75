"""Sample images from a bundle: check a request against the manifest, then run all steps."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np

from admtrt.bundle import Bundle
from admtrt.contract import event_shape
from admtrt.errors import ConfigError, RequestError
from admtrt.images import from_uint8
from admtrt.runtime.backends.default import DEFAULT_BACKEND
from admtrt.runtime.backends.graphs import GraphDenoiser
from admtrt.runtime.conditioning import check_conditioning
from admtrt.runtime.drawn import Given, Samples, Step, state_after, with_bar
from admtrt.runtime.guide_targets import GuideTargets
from admtrt.runtime.image_inputs import NOTHING, ImageInputs
from admtrt.runtime.latents import Latents
from admtrt.runtime.noise import MAX_SEED, check_seed
from admtrt.runtime.request import class_index, one_for_each, some_names, whole_number
from admtrt.runtime.sampler import hold, runs_of
from admtrt.runtime.slots import slots_for
from admtrt.schedule.guides import GuideChoice, guide_choices
from admtrt.schedule.sampler import SamplerChoices, with_choices
from admtrt.schedule.table import sampling_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from admtrt.contract import Precision
    from admtrt.runtime.backends.auto import Fastest
    from admtrt.runtime.backends.choice import BackendChoice
    from admtrt.runtime.image_inputs import Known
    from admtrt.runtime.sampler import Denoiser
    from admtrt.runtime.slots import Images, Labels, Slots
    from admtrt.schedule.guides import Place
    from admtrt.schedule.sampler import SamplerConfig
    from admtrt.schedule.table import SamplingSchedule

DEFAULT_BATCH = 16


class Pipeline:
    """Sampling from one bundle.

    Args:
        bundle: a verified bundle.
        denoiser: runs the graphs; a backend, or for instance PyTorch.
        computed: describes what runs the graphs, for the record of long runs.
    """

    def __init__(self, bundle: Bundle, denoiser: Denoiser, *, computed: str = "") -> None:
        self.bundle = bundle
        self.denoiser = denoiser
        self.computed = computed

    def __repr__(self) -> str:
        manifest = self.bundle.manifest
        event = "x".join(map(str, event_shape(manifest.network)))
        classes = "no classes" if manifest.num_classes is None else f"{manifest.num_classes} classes"
        computed = f"; {self.computed}" if self.computed else ""
        return f"Pipeline({str(self.bundle.path)!r}: {event}, {classes}, {manifest.sampler.method}{computed})"

    @classmethod
    def from_bundle(
        cls,
        path: str | Path | Bundle,
        *,
        backend: str = DEFAULT_BACKEND,
        precision: Precision = "fp32",
        threads: int | None = None,
        plans: str | Path | None = None,
        batch_size: int = 1,
        guides: Collection[str] | None = None,
        progress: Callable[[str | Fastest], None] = lambda _: None,
    ) -> Self:
        """Open a bundle.

        Args:
            path: the bundle's directory, or an open bundle.
            backend, precision, threads, plans, batch_size: as of
                :class:`~admtrt.runtime.backends.choice.BackendChoice`.
            guides: names of the bundle's guides to open; None for all.
            progress: called with what the backend ``auto`` measures and finds.

        Raises:
            BundleError: if the bundle is incomplete or altered.
            RequestError: if the backend is unknown or cannot do this, or ``threads`` is out of range.
            UserError: if the backend cannot run here.
        """
        from admtrt.runtime.backends.choice import BackendChoice

        plans = None if plans is None else Path(plans)
        choice = BackendChoice(backend, precision, threads, plans, batch_size)
        bundle = path if isinstance(path, Bundle) else Bundle.open(Path(path))
        return cls.open(bundle, choice, guides=guides, progress=progress)

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        choice: BackendChoice,
        *,
        guides: Collection[str] | None = None,
        progress: Callable[[str | Fastest], None] = lambda _: None,
    ) -> Self:
        """Open the graphs of an open bundle on the chosen backend.

        Raises:
            RequestError, UserError: as :meth:`from_bundle`.
        """
        from admtrt.runtime.backends.opening import graphs_with, open_denoiser

        denoiser = open_denoiser(bundle, choice, graphs=graphs_with(bundle, guides), progress=progress)
        return cls(bundle, denoiser, computed=str(choice))

    def __call__(
        self,
        labels: Sequence[int | str] | None = None,
        seeds: Sequence[int] | None = None,
        *,
        low_res: NDArray[np.uint8] | Images | None = None,
        latents: Images | Latents | None = None,
        init: NDArray[np.uint8] | Images | None = None,
        strength: float | None = None,
        known: Known | None = None,
        jump: tuple[int, int] | None = None,
        reference: NDArray[np.uint8] | Images | None = None,
        low_pass: int | tuple[int, int] | None = None,
        recurrence: int | None = None,
        guides: Mapping[str, Mapping[str, Any]] | None = None,
        guide_scale: Mapping[str, float] | None = None,
        guide_interval: Mapping[str, tuple[float, float]] | None = None,
        guide_place: Mapping[str, Place] | None = None,
        guide_clip: Mapping[str, bool] | None = None,
        batch_size: int = DEFAULT_BATCH,
        callback: Callable[[Step], None] | None = None,
        progress: bool = False,
        **choices: Unpack[SamplerChoices],
    ) -> Samples:
        """Draw one sample for each label and seed.

        Args:
            labels: class of each sample, by number or name; needed where the UNet is class-conditional or the
                scale is not 0.
            seeds: seed of each sample, 0 to 2**64 - 1; by default 0, 1, 2, ...
            low_res: conditioning of an upsampler: uint8 [N, h, w, C], or float32 [N, C, h, w] in [-1, 1].
            latents, init, strength, known, jump, reference, low_pass, recurrence: as
                :class:`~admtrt.runtime.image_inputs.ImageInputs`; inverted latents bring the inversion's
                steps, method and clip as defaults.
            guides: the guides to use, with the targets of each, as
                :class:`~admtrt.runtime.guide_targets.GuideTargets`.
            guide_scale, guide_interval, guide_place, guide_clip: as :meth:`guide_choices`.
            batch_size: samples computed at once; it changes samples only by rounding.
            callback: called after every evaluation of every batch.
            progress: show a bar on a terminal.
            choices: as :meth:`sampler`.

        Raises:
            RequestError: for anything that the bundle cannot do.
        """
        inputs = ImageInputs(
            init, strength, known, jump, reference, low_pass, latents, GuideTargets(guides or {}), recurrence
        )
        if guides or guide_scale or guide_interval or guide_place or guide_clip:
            choices["guided_by"] = self.guide_choices(
                guides or {},
                scale=guide_scale,
                interval=guide_interval,
                place=guide_place,
                clip=guide_clip,
            )
        return self.draw(
            self.sampler(**(latents.choices(choices) if isinstance(latents, Latents) else choices)),
            labels,
            seeds,
            low_res=low_res,
            inputs=inputs,
            batch_size=batch_size,
            callback=callback,
            progress=progress,
        )

    def draw(
        self,
        sampler: SamplerConfig,
        labels: Sequence[int | str] | None = None,
        seeds: Sequence[int] | None = None,
        *,
        low_res: NDArray[np.uint8] | Images | None = None,
        inputs: ImageInputs = NOTHING,
        batch_size: int = DEFAULT_BATCH,
        callback: Callable[[Step], None] | None = None,
        progress: bool = False,
    ) -> Samples:
        """Draw samples with a sampler made by :meth:`sampler`; otherwise like calling the pipeline."""
        if whole_number(batch_size, "batch_size") < 1:
            raise RequestError(f"batch_size is {batch_size}; expected at least 1")
        given = self.check(sampler, labels, seeds, low_res=low_res, inputs=inputs)
        total = len(given) * len(given.inputs.schedule(self.bundle.manifest.diffusion, sampler))
        with with_bar(callback, total) if progress else nullcontext(callback) as after_step:
            parts = [
                self._batch(first, given.part(slice(first, first + batch_size)), after_step)
                for first in range(0, len(given), batch_size)
            ]
        return Samples(
            x=np.concatenate(parts),
            labels=given.labels,
            seeds=tuple(given.seeds),
            class_names=tuple(self.bundle.manifest.class_names),
        )

    def check(
        self,
        sampler: SamplerConfig,
        labels: Sequence[int | str] | None = None,
        seeds: Sequence[int] | None = None,
        *,
        low_res: NDArray[np.uint8] | Images | None = None,
        inputs: ImageInputs = NOTHING,
    ) -> Given:
        """Check a request's parts against the bundle and each other; arguments as :meth:`draw`.

        Raises:
            RequestError: for anything that the bundle cannot do.
        """
        conditioning, checked_inputs = self.check_low_res(low_res), self.check_inputs(sampler, inputs)
        checked_labels = self.check_labels(labels, sampler)
        checked_inputs.targets.check_labels(checked_labels, self.bundle.manifest.guides)
        given_seeds = None if seeds is None else one_for_each(seeds, "seeds")
        rows = {"labels": checked_labels, "seeds": given_seeds, "low_res": conditioning}
        lengths = {name: len(given) for name, given in rows.items() if given is not None}
        lengths |= {name: length for name, length in checked_inputs.lengths.items() if length > 1}
        count = next(iter(lengths.values()), 1)
        checked_seeds = [check_seed(seed) for seed in (range(count) if given_seeds is None else given_seeds)]
        for name, length in lengths.items():
            if length != count:
                raise RequestError(f"{length} {name} for {count} samples; give one for each")
        if count < 1:
            raise RequestError("no sample was asked for")
        return Given(sampler, checked_labels, checked_seeds, conditioning, checked_inputs)

    def sampler(self, **choices: Unpack[SamplerChoices]) -> SamplerConfig:
        """The bundle's recommended sampler with some choices replaced, checked against the bundle.

        Args:
            choices: as :class:`~admtrt.schedule.sampler.SamplerConfig`; defaults are the bundle's
                recommendation. ``steps`` without a method imply one: "ddimN" the method ``ddim``, others
                ``ddpm``. The method ``auto`` keeps the recommended one.

        Raises:
            RequestError: if the result is impossible.
        """
        manifest = self.bundle.manifest
        if manifest.classifier is None and choices.get("scale") is None:
            choices["scale"] = 0.0
        try:
            sampler = with_choices(manifest.sampler, manifest.diffusion, choices)
        except ConfigError as error:
            raise RequestError(error.message) from None
        if sampler.scale and manifest.classifier is None:
            raise RequestError(
                f"scale {sampler.scale} asks for guidance, but {self.bundle.path} holds no classifier",
                hint="Use scale 0, or export with --classifier.",
            )
        if not sampler.scale:
            if choices.get("guidance_interval") is not None:
                raise RequestError(
                    "a guidance interval was given, but at scale 0 nothing is guided",
                    hint="Leave it out, or use another scale.",
                )
            sampler = sampler.unguided
        schedule = sampling_schedule(manifest.diffusion, sampler)  # raises now if impossible
        if schedule.full and "update_full" not in manifest.graphs:
            raise RequestError(
                f"method '{sampler.method}' needs the graph 'update_full', which {self.bundle.path} has not",
                hint="Export the checkpoint again, with --overwrite, or use ddpm or ddim.",
            )
        return sampler

    def guide_choices(
        self,
        names: Iterable[str],
        *,
        scale: Mapping[str, float] | None = None,
        interval: Mapping[str, tuple[float, float]] | None = None,
        place: Mapping[str, Place] | None = None,
        clip: Mapping[str, bool] | None = None,
    ) -> tuple[GuideChoice, ...]:
        """Make the value of ``guided_by`` of :meth:`sampler` from choices for the bundle's guides.

        Arguments and errors are those of :func:`admtrt.schedule.guides.guide_choices`.
        """
        return guide_choices(
            self.bundle.manifest.guides,
            names,
            str(self.bundle.path),
            scale=scale,
            interval=interval,
            place=place,
            clip=clip,
        )

    def check_labels(self, labels: Sequence[int | str] | None, sampler: SamplerConfig) -> Labels | None:
        """Check labels and return them as int64 [N], or None.

        Raises:
            RequestError: if they are missing, not wanted, unknown or out of range.
        """
        manifest = self.bundle.manifest
        classes = manifest.num_classes
        if labels is None:
            if manifest.network.num_classes is not None or sampler.scale:
                raise RequestError(
                    f"labels are needed: the bundle has {classes} classes",
                    hint="Give one class for each sample.",
                )
            return None
        if classes is None:
            raise RequestError("labels were given, but the bundle knows no classes")
        checked = [class_index(label, manifest) for label in one_for_each(labels, "labels")]
        wrong = next((label for label in checked if not 0 <= label < classes), None)
        if wrong is not None:
            names = some_names(manifest.class_names)
            raise RequestError(
                f"class {wrong} is out of range; the classes are 0 to {classes - 1}"
                + (f" ({names})" if names else "")
            )
        return np.array(checked, dtype=np.int64)

    def check_low_res(self, low_res: NDArray[np.uint8] | Images | None) -> Images | None:
        """Check an upsampler's conditioning and return it as float32 [N, C, h, w], or None.

        Raises:
            RequestError: if it is missing, not wanted or of another shape or type.
        """
        images = None if low_res is None else np.asarray(low_res)
        check_conditioning(self.bundle, images)
        if images is None:
            return None
        if images.dtype == np.uint8:
            return np.ascontiguousarray(from_uint8(images.transpose(0, 3, 1, 2)))
        if not np.isfinite(images).all():
            raise RequestError("low_res has values that are not finite")
        return np.ascontiguousarray(images)

    def check_inputs(self, sampler: SamplerConfig, inputs: ImageInputs) -> ImageInputs:
        """Check the images to start from or to condition on.

        Raises:
            RequestError: for images that do not fit, or that the bundle or the sampler cannot use.
        """
        manifest = self.bundle.manifest
        checked = inputs.checked(event_shape(manifest.network))
        checked = replace(checked, targets=checked.targets.checked(manifest, sampler.guided_by))
        graph = checked.schedule(manifest.diffusion, sampler).edit_graph
        if graph is not None and graph not in manifest.graphs:
            raise RequestError(
                f"known regions and references need the graph '{graph}', which {self.bundle.path} has not",
                hint="Export the checkpoint again, with --overwrite.",
            )
        return checked

    def slots(self, given: Given) -> Slots:
        """Slots of a checked request's samples, at the start of their schedule."""
        manifest = self.bundle.manifest
        schedule = given.inputs.schedule(manifest.diffusion, given.sampler)
        return slots_for(
            manifest.network,
            manifest.classifier,
            [schedule] * len(given),
            given.seeds,
            labels=given.labels,
            low_res=given.low_res,
            guided=bool(given.sampler.scale),
            guides=manifest.guides,
            targets=given.inputs.targets.of_slots(len(given), given.labels, manifest.guides),
            **given.inputs.of_slots(len(given), event_shape(manifest.network)),
        )

    def finished(self, given: Given, x: Images) -> Images:
        """Check the states after the last evaluation and return them as samples, float32 [N, C, H, W].

        Raises:
            RequestError: if they are not finite.
        """
        sampler = given.sampler
        if not np.isfinite(x).all():
            guides = "".join(f", guide '{one.name}' at scale {one.scale:g}" for one in sampler.guided_by)
            raise RequestError(
                f"sampling gave values that are not finite (scale {sampler.scale}, steps {sampler.steps!r}"
                f"{guides})",
                hint="Use a smaller scale or more steps; if that does not help, the weights may be at fault; "
                "see: admtrt verify BUNDLE --unet CHECKPOINT",
            )
        return given.inputs.finished(x)

    def _batch(self, first: int, given: Given, callback: Callable[[Step], None] | None) -> Images:
        slots = self.slots(given)
        self.drive(slots, first, callback)
        return self.finished(given, slots.x)

    def invert(
        self,
        images: NDArray[np.uint8] | Images,
        labels: Sequence[int | str] | None = None,
        *,
        steps: str | int = "ddim100",
        levels: int | None = None,
        clip: bool = False,
        batch_size: int = DEFAULT_BATCH,
        callback: Callable[[Step], None] | None = None,
    ) -> Latents:
        """Find the latents that DDIM decodes into these images, for the argument ``latents`` of a call.

        Args:
            images: uint8 [N, H, W, C] or float32 [N, C, H, W] in [-1, 1].
            labels: of each image, needed where the UNet is class-conditional.
            steps: DDIM steps, as for sampling.
            levels: number of steps to go up; all but one by default.
            clip: bound x_0 on the way. Where the bound acts, inversion is not exact.
            batch_size: images computed at once.
            callback: called after every evaluation of every batch.

        Raises:
            RequestError: for anything that the bundle cannot do.
        """
        from admtrt.runtime.inversion import InversionRequest

        request = InversionRequest.checked(
            self, images, labels, steps=steps, levels=levels, clip=clip, batch_size=batch_size
        )
        return request.latents(request.inverted(slice(None), callback), slice(None))

    def open_graphs(self, schedule: SamplingSchedule) -> None:
        """Open the graphs that a schedule runs, and no others, so that their faults show before long work.

        Raises:
            BundleError: if one cannot be used.
        """
        if isinstance(self.denoiser, GraphDenoiser):
            self.denoiser.open(runs_of(schedule, self.bundle.manifest.guides).keys())

    def drive(self, slots: Slots, first: int, callback: Callable[[Step], None] | None) -> None:
        """Run all steps of samples that share a schedule, in place.

        Args:
            slots: the samples, at the start of their schedule.
            first: position of the first among all samples, for the callback.
            callback: called after every evaluation.
        """
        schedule = slots.schedules[0]
        self.open_graphs(schedule)
        with hold(slots, self.denoiser) as held:
            for index in range(len(schedule)):
                held.advance()
                if callback is not None:
                    callback(
                        Step(
                            index=index + 1,
                            total=len(schedule),
                            first=first,
                            count=len(slots),
                            timestep=schedule.timestep(index),
                            state=partial(state_after, index + 1, slots, held),
                        )
                    )
            held.read()


def consecutive_seeds(first: int, count: int) -> range:
    """Seeds of ``count`` samples from ``first`` on.

    Raises:
        RequestError: if a seed is out of range, or ``count`` is 0.
    """
    if whole_number(count, "count") < 1:
        raise RequestError(f"{count} samples were asked for; expected at least 1")
    check_seed(first)
    if first + count - 1 > MAX_SEED:
        raise RequestError(f"seeds {first} to {first + count - 1} leave the range 0 to {MAX_SEED}")
    return range(first, first + count)
