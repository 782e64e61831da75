"""Latents: the x_T that samples start from, of inverted images or of seeds, and paths between two of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np

from admtrt.contract import event_shape
from admtrt.errors import RequestError
from admtrt.files import atomic_file
from admtrt.runtime.images_in import check_sizes, checked_images, read_npz
from admtrt.runtime.noise import check_seed, initial_noise
from admtrt.runtime.request import whole_number

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from admtrt.config import UNetConfig
    from admtrt.npz import Header
    from admtrt.runtime.images_in import Check, Upload
    from admtrt.runtime.slots import Images, Labels
    from admtrt.schedule.sampler import SamplerChoices

_STRAIGHT = 1e-4  # below this angle a slerp is linear: it divides by the sine
_OPTIONAL = {"levels", "steps", "clip", "labels", "images"}
_DDIM = "ddim"


@dataclass(frozen=True, eq=False)
class Latents:
    """States that samples start from.

    Attributes:
        x: float32 [N, C, H, W].
        levels: number of steps that the images were inverted by; None for standard normal noise, which every
            solver can start from.
        steps, clip: of the inversion; None where there was none.
        labels: int64 [N], the labels of the inversion, or None.
        images: the inverted images, uint8 [N, H, W, C] or float32 [N, C, H, W], or None.
    """

    x: Images
    levels: int | None = None
    steps: str | None = None
    clip: bool | None = None
    labels: Labels | None = None
    images: NDArray[Any] | None = None

    @classmethod
    def of_seeds(cls, seeds: Sequence[int], network: UNetConfig) -> Self:
        """The initial noise of samples with these seeds.

        Raises:
            RequestError: for an invalid seed.
        """
        checked = [check_seed(seed) for seed in seeds]
        return cls(initial_noise(checked, event_shape(network), stage=network.low_res_size or 0))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice) -> Self:
        """The latents at these indices."""
        return replace(
            self,
            x=self.x[rows],
            labels=None if self.labels is None else self.labels[rows],
            images=None if self.images is None else self.images[rows],
        )

    def checked(self, event: tuple[int, ...]) -> Self:
        """Check the latents against a network and return them.

        Raises:
            RequestError: for another type, shape or values that are not finite.
        """
        x = np.asarray(self.x)
        _check_sizes(x, event)
        if not np.isfinite(x).all():
            raise RequestError("latents have values that are not finite")
        return replace(self, x=x)

    def choices(self, given: SamplerChoices) -> SamplerChoices:
        """A request's choices, completed by those of the inversion."""
        if self.levels is None:
            return given
        chosen: SamplerChoices = {**given}
        if chosen.get("method") is None:
            chosen["method"] = _DDIM
        if chosen.get("steps") is None:
            chosen["steps"] = self.steps
        if chosen.get("clip") is None:
            chosen["clip"] = self.clip
        return chosen

    def between(self, first: int, second: int, count: int) -> Self:
        """``count`` latents on the path from one of these to another, ends included.

        Raises:
            RequestError: if an index is out of range, ``count`` is below two, or their labels differ.
        """
        for index in (first, second):
            if not 0 <= whole_number(index, "the index of latents") < len(self):
                raise RequestError(
                    f"there are no latents {index}; there are {len(self)}, counted from 0",
                    hint=f"Give two of 0 to {len(self) - 1}.",
                )
        labels = None if self.labels is None else self.labels[[first, second]]
        return replace(
            self,
            x=slerp(self.x[first], self.x[second], count),
            labels=np.repeat(labels[:1], count) if labels is not None and labels[0] == labels[1] else None,
            images=None,
        )

    def save(self, path: Path) -> None:
        """Write an .npz file: ``latents``, and every other field that is not None.

        Raises:
            OutputError: if it cannot be written.
        """
        with atomic_file(path) as temporary, temporary.open("wb") as opened:
            self.write(opened)

    def write(self, opened: IO[bytes]) -> None:
        """Like :meth:`save`, into an open file."""
        held = {name: getattr(self, name) for name in sorted(_OPTIONAL)}
        arrays = {name: np.asarray(one) for name, one in held.items() if one is not None}
        np.savez(opened, latents=self.x, **arrays)  # type: ignore[arg-type]

    @classmethod
    def read(cls, path: Path | Upload, event: tuple[int, ...]) -> Self:
        """Read a file of :meth:`save`. ``latents`` without further fields are standard normal noise.

        Raises:
            RequestError: if it cannot be read or holds something else.
        """

        def check(name: str, kinds: str, rank: int) -> Check:
            def checked(header: Header) -> None:
                if header.dtype.kind not in kinds or len(header.shape) != rank:
                    raise RequestError(
                        f"{path}: {name} is {header}", hint="Give the latents.npz that admtrt invert wrote."
                    )

            return checked

        def check_latents(header: Header) -> None:
            _check_sizes(header, event)

        known = {
            "levels": check("levels", "iu", 0),
            "steps": check("steps", "U", 0),
            "clip": check("clip", "b", 0),
            "labels": check("labels", "iu", 1),
            "images": lambda header: check_sizes(header, event, f"images of {path}"),
        }
        arrays = read_npz(path, "--latents", {"latents": check_latents}, known)
        x = arrays.pop("latents")
        inverted = {"levels", "steps", "clip"} & arrays.keys()
        if len(inverted) not in (0, 3) or ("levels" in arrays and arrays["levels"] < 1):
            raise RequestError(
                f"{path} does not tell levels of at least 1 together with steps and clip",
                hint="Give the latents.npz that admtrt invert wrote, or latents alone.",
            )
        images, labels = arrays.get("images"), arrays.get("labels")
        if images is not None:
            checked_images(images, event, f"images of {path}")
        for name, one in (("images", images), ("labels", labels)):
            if one is not None and len(one) != len(x):
                raise RequestError(f"{path} holds {len(one)} {name} for {len(x)} latents")
        made = cls(
            x=x,
            levels=int(arrays["levels"]) if inverted else None,
            steps=str(arrays["steps"]) if inverted else None,
            clip=bool(arrays["clip"]) if inverted else None,
            labels=None if labels is None else labels.astype(np.int64),
            images=images,
        )
        return made.checked(event)


def _check_sizes(x: Images | Header, event: tuple[int, ...]) -> None:
    if x.dtype != np.float32 or x.shape[1:] != event or x.shape[0] == 0:
        expected = ", ".join(map(str, event))
        raise RequestError(
            f"latents are {x.dtype} {list(x.shape)}; expected finite float32 [N, {expected}], N at least 1"
        )


def slerp(first: Images, second: Images, count: int) -> Images:
    """Slerp: ``count`` states on the great circle between two, ends included, float32 [count, *event].

    It takes a straight line if the angle is below 1e-4, or if the states are opposite, where the great circle
    is not unique.

    Raises:
        RequestError: if fewer than two are asked for.
    """
    if whole_number(count, "the number of latents") < 2:
        raise RequestError(f"{count} samples on the way between two; expected at least 2, both ends")
    a, b = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    angle = np.arccos(np.clip((a * b).sum() / norms, -1, 1)) if norms else 0.0
    fractions = np.linspace(0.0, 1.0, count).reshape(-1, *[1] * a.ndim)
    if np.sin(angle) < _STRAIGHT:
        return ((1 - fractions) * a + fractions * b).astype(np.float32)
    from_a, from_b = np.sin((1 - fractions) * angle), np.sin(fractions * angle)
    way: Images = ((from_a * a + from_b * b) / np.sin(angle)).astype(np.float32)
    return way
