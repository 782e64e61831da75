"""Images and targets that samples start from or are conditioned on, and their allowed combinations."""

from __future__ import annotations

import hashlib
import reprlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from admtrt.errors import RequestError
from admtrt.runtime.guide_targets import NO_TARGETS, GuideTargets
from admtrt.runtime.images_in import as_states, checked_images, checked_mask
from admtrt.runtime.latents import Latents
from admtrt.runtime.low_pass import low_pass_matrix
from admtrt.runtime.request import whole_number
from admtrt.schedule.edits import KnownRegion, LowPass, Recurrence
from admtrt.schedule.inversion import decoding_schedule
from admtrt.schedule.process import retained_timesteps
from admtrt.schedule.table import check_respaced, sampling_schedule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from admtrt.config import DiffusionConfig, EdmConfig
    from admtrt.runtime.slots import Conditions, Images
    from admtrt.schedule.edits import Edit
    from admtrt.schedule.sampler import SamplerConfig
    from admtrt.schedule.table import SamplingSchedule

DIGESTS = ("init", "known", "mask", "reference", "latents")
"""Keys of an identity whose values are digests of arrays."""
NUMBERS = ("strength", "jump", "known_as_sampled", "low_pass", "levels_up", "recurrence")
"""The other keys of an identity, except :data:`TARGETS`."""
TARGETS = "targets"
"""Key of an identity: digests of the guides' targets, by guide and name."""
_BLOCK = 256  # images that a digest reads at once


@dataclass(frozen=True, eq=False)
class Known:
    """Inpainting: known pixels of images. The others are sampled.

    Attributes:
        images: uint8 [N, H, W, C] or float32 [N, C, H, W] in [-1, 1]; one serves all samples.
        mask: 1 or True marks known pixels, [H, W], [N, H, W] or [N, 1, H, W]; one serves all samples.
        as_sampled: keep the networks' output in the known pixels, instead of copying the given values.
    """

    images: Any
    mask: Any
    as_sampled: bool = False


@dataclass(frozen=True, eq=False)
class ImageInputs:
    """Images for samples. A single image of a kind serves all samples.

    Attributes:
        init: images to start from, uint8 [N, H, W, C] or float32 [N, C, H, W] in [-1, 1].
        strength: fraction of the schedule to run from them, in (0, 1]: its last round(strength *
            evaluations).
        known: known pixels, for inpainting.
        jump: (L, N), RePaint's resampling: jump back L steps until each step was reached N times.
        reference: images whose low frequencies are kept (ILVR), in the form of ``init``.
        low_pass: downsampling factor N of the low-pass filter, or (N, last step that uses the reference).
        latents: float32 [N, C, H, W] in place of noise drawn from the seeds, or the result of an inversion.
        targets: targets of the guides.
        recurrence: how often each noise level is evaluated, with noise added in between; see
            :class:`~admtrt.schedule.edits.Recurrence`.
    """

    init: Any = None
    strength: float | None = None
    known: Known | None = None
    jump: tuple[int, int] | None = None
    reference: Any = None
    low_pass: int | tuple[int, int] | None = None
    latents: Images | Latents | None = None
    targets: GuideTargets = NO_TARGETS
    recurrence: int | None = None

    def checked(self, event: tuple[int, ...]) -> Self:
        """Check the inputs and return them as arrays.

        Args:
            event: (C, H, W) of the network.

        Raises:
            RequestError: for invalid or mutually exclusive images, masks or numbers.
        """
        for one, other, reason in (
            ("init", "strength", "belong together"),
            ("reference", "low_pass", "belong together"),
        ):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                missing = other if getattr(self, other) is None else one
                raise RequestError(f"{one} and {other} {reason}; there is no {missing}")
        for one, other in (("init", "latents"), ("known", "reference")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise RequestError(f"{one} and {other} exclude each other", hint="Leave one out.")
        if self.jump is not None and self.known is None:
            raise RequestError(
                "a jump resamples around known pixels, and there are none", hint="Give --known with --mask."
            )
        if self.recurrence is not None:
            _recurrence(self.recurrence)
            for other in ("known", "reference"):
                if getattr(self, other) is not None:
                    raise RequestError(f"recurrence and {other} exclude each other", hint="Leave one out.")
        known = self.known
        if known is not None:
            images = checked_images(known.images, event, "known")
            known = replace(known, images=images, mask=checked_mask(known.mask, event))
        return replace(
            self,
            init=None if self.init is None else checked_images(self.init, event, "init"),
            strength=None if self.strength is None else _strength(self.strength),
            known=known,
            jump=None if self.jump is None else _jump(self.jump),
            reference=None if self.reference is None else checked_images(self.reference, event, "reference"),
            low_pass=None if self.low_pass is None else _low_pass(self.low_pass, event),
            latents=None if self.latents is None else _latents(self.latents).checked(event),
        )

    @property
    def lengths(self) -> Mapping[str, int]:
        """The number of rows of each input that was given, by name."""
        arrays = {
            "init": self.init,
            "known": None if self.known is None else self.known.images,
            "masks": None if self.known is None else self.known.mask,
            "reference": self.reference,
            "latents": self.latents,
        }
        lengths = {name: len(one) for name, one in arrays.items() if one is not None}
        return lengths | self.targets.lengths

    def schedule(self, process: DiffusionConfig | EdmConfig, sampler: SamplerConfig) -> SamplingSchedule:
        """The schedule of samples with these inputs, which have to be checked.

        Raises:
            RequestError: if the sampler has no such schedule.
        """
        edit = self._edit
        levels = self.latents.levels if isinstance(self.latents, Latents) else None
        if levels is not None:
            check_respaced(sampler, "latents of an inversion")
            assert process.kind == "discrete"  # as those solvers declare
            self._check_levels(process.steps, sampler)
            return decoding_schedule(process, sampler, levels, edit)
        if self.strength is None:
            return sampling_schedule(process, sampler, None, edit)
        total = len(sampling_schedule(process, sampler))
        count = round(self.strength * total)
        if count < 1:
            raise RequestError(
                f"strength {self.strength:g} of {total} evaluations is none",
                hint=f"Use {1 / total:.3g} or more, or more steps.",
            )
        return sampling_schedule(process, sampler, count, edit)

    def part(self, rows: slice) -> Self:
        """The inputs of some samples."""

        def taken(given: Any) -> Any:
            return given if given is None or len(given) == 1 else given[rows]

        known = self.known
        if known is not None:
            known = replace(known, images=taken(known.images), mask=taken(known.mask))
        return replace(
            self,
            init=taken(self.init),
            known=known,
            reference=taken(self.reference),
            latents=taken(self.latents),
            targets=self.targets.part(rows),
        )

    def of_slots(self, count: int, event: tuple[int, ...]) -> dict[str, Any]:
        """Arguments for :func:`~admtrt.runtime.slots.slots_for`, for ``count`` samples of a shape."""
        latents = None if self.latents is None else _latents(self.latents).x
        images = None if self.init is None else as_states(self.init)
        return {
            "latents": None if latents is None else _for_all(latents, count),
            "images": None if images is None else _for_all(images, count),
            "edits": self._edits(count, event),
        }

    def finished(self, x: Images) -> Images:
        """Samples with exact known pixels, float32 [N, C, H, W]: the edit of the last step rounds them."""
        if self.known is None or self.known.as_sampled:
            return x
        return np.where(self.known.mask, as_states(self.known.images), x)

    @property
    def identity(self) -> dict[str, Any]:
        """The inputs' part of a run's identity, as JSON values; empty if nothing was given."""
        known, latents = self.known, None if self.latents is None else _latents(self.latents)
        arrays = (
            self.init,
            None if known is None else known.images,
            None if known is None else known.mask,
            self.reference,
            None if latents is None else latents.x,
        )
        digests = [None if one is None else digest_of(one) for one in arrays]
        numbers = (
            self.strength,
            None if self.jump is None else list(self.jump),
            True if known is not None and known.as_sampled else None,
            list(self.low_pass) if isinstance(self.low_pass, tuple) else None,
            None if latents is None else latents.levels,
            self.recurrence,
        )
        named = zip((*DIGESTS, *NUMBERS), (*digests, *numbers), strict=True)
        identity = {name: one for name, one in named if one is not None}
        targets = {name: digest_of(one) for name, one in self.targets.arrays.items()}
        return identity | ({TARGETS: targets} if targets else {})

    @property
    def _edit(self) -> Edit | None:
        if self.known is not None:
            return KnownRegion(self.jump, self.known.as_sampled)
        if isinstance(self.low_pass, tuple):
            return LowPass(self.low_pass[1])
        return None if self.recurrence is None else Recurrence(self.recurrence)

    def _edits(self, count: int, event: tuple[int, ...]) -> Conditions | None:
        if self.recurrence is not None:
            sizes = {"mask": (1, *event[1:]), "reference": event}
            return {"edit": {name: np.zeros((count, *size), np.float32) for name, size in sizes.items()}}
        if self.known is not None:
            mask = _for_all(self.known.mask.astype(np.float32), count)
            return {"edit": {"mask": mask, "reference": _for_all(as_states(self.known.images), count)}}
        if not isinstance(self.low_pass, tuple):
            return None
        reference = as_states(self.reference)
        filters = {
            name: _for_all(low_pass_matrix(size, self.low_pass[0]).astype(np.float32)[None], count)
            for name, size in zip(("rows", "columns"), reference.shape[2:], strict=True)
        }
        return {"edit_low_pass": {**filters, "reference": _for_all(reference, count)}}

    def _check_levels(self, steps: int, sampler: SamplerConfig) -> None:
        assert isinstance(self.latents, Latents)
        theirs = self.latents.steps or ""
        retained = retained_timesteps(steps, theirs)
        if retained_timesteps(steps, sampler.steps) != retained:
            raise RequestError(
                f"the latents were inverted over steps {theirs!r}, and steps {sampler.steps!r} have other "
                "noise levels",
                hint="Leave --steps out, or invert the images again.",
            )
        if not 1 <= (self.latents.levels or 0) < len(retained):
            raise RequestError(
                f"the latents say that they are {self.latents.levels} levels up; steps {theirs!r} have "
                f"{len(retained) - 1}",
                hint="Give the latents.npz that admtrt invert wrote.",
            )


NOTHING = ImageInputs()


def digest_of(images: Any) -> str:
    """SHA-256 of the values of an array, which may be read a part at a time."""
    digest = hashlib.sha256()
    for start in range(0, len(images), _BLOCK):
        digest.update(np.ascontiguousarray(images[start : start + _BLOCK]).data)
    return digest.hexdigest()


def _for_all(rows: NDArray[Any], count: int) -> NDArray[Any]:
    return np.repeat(rows, count, axis=0) if len(rows) == 1 < count else rows


def _latents(given: Images | Latents) -> Latents:
    return given if isinstance(given, Latents) else Latents(given)


def _strength(given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float | np.number) or not 0 < given <= 1:
        raise RequestError(
            f"strength is {reprlib.repr(given)}; expected a number above 0, up to 1",
            hint="1 goes the whole way, small values stay near the image.",
        )
    return float(given)


def _recurrence(given: Any) -> None:
    if whole_number(given, "recurrence") < 2:
        raise RequestError(
            f"recurrence is {given}; expected 2 or more evaluations of each level",
            hint="Universal Guidance uses 2 to 10. For one, leave it out.",
        )


def _jump(given: Any) -> tuple[int, int]:
    """Check the (L, N) of a jump."""
    length, times = _pair(given, "jump", "(10, 10)")
    if length < 1 or times < 2:
        raise RequestError(
            f"jump is {length}:{times}; expected at least one step, and two times to reach it",
            hint="RePaint uses 10:10. For none, leave it out.",
        )
    return length, times


def _low_pass(given: Any, event: tuple[int, ...]) -> tuple[int, int]:
    """Check ``low_pass``: a factor that divides the images' size, and the last step that uses it."""
    factor, until = _pair(given, "low_pass", "(4, 0)") if _is_pair(given) else (given, 0)
    factor = whole_number(factor, "low_pass")
    sides = event[1:]
    if factor < 2 or any(side % factor for side in sides):
        raise RequestError(
            f"low_pass is {factor}; expected 2 or more, and a divisor of {sides[1]}x{sides[0]} pixels",
            hint="ILVR uses 4 to 32 at 256 pixels: the larger, the freer.",
        )
    if until < 0:
        raise RequestError(f"low_pass holds until step {until}; expected 0 or more")
    return factor, until


def _pair(given: Any, name: str, example: str) -> tuple[int, int]:
    if not _is_pair(given):
        raise RequestError(f"{name} is {reprlib.repr(given)}; expected two numbers", hint=f"E.g. {example}.")
    return whole_number(given[0], name), whole_number(given[1], name)


def _is_pair(given: Any) -> bool:
    return isinstance(given, tuple | list) and len(given) == 2
