"""Options of ``admtrt sample`` for guides other than the classifier."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from admtrt.commands.groups import takes_group
from admtrt.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admtrt.bundle import Manifest
    from admtrt.npz import Header
    from admtrt.runtime.guide_targets import GuideTargets
    from admtrt.schedule.guides import GuideChoice

_PANEL = "Guides besides the classifier"
_OF = "; GUIDE= may be omitted if there is only one guide"


def _option(help_text: str, metavar: str, *flag: str) -> Any:
    return typer.Option(*flag, help=help_text, metavar=metavar, rich_help_panel=_PANEL)


@dataclass(frozen=True)
class GuideOptions:
    """The options as given."""

    guide: Annotated[list[str] | None, _option("Use this guide of the bundle; may be repeated.", "NAME")] = (
        None
    )
    target: Annotated[
        list[str] | None,
        _option(
            "Target of a guide's loss: an .npz (arr_0), for images also a picture or a folder"
            + _OF.replace("GUIDE=", "GUIDE."),
            "[GUIDE.]NAME=FILE",
        ),
    ] = None
    operator: Annotated[
        list[str] | None,
        _option(
            f"Measurement operator of the guide linear: sr:4, pool:2, blur:1.5:9; {_OF[2:]}.",
            "[GUIDE=]OPERATOR",
        ),
    ] = None
    guide_scale: Annotated[
        list[str] | None, _option("Guidance scale of a guide. Default: the bundle's.", "[GUIDE=]SCALE")
    ] = None
    guide_interval: Annotated[
        list[str] | None, _option("Use a guide only at noise levels in this interval.", "[GUIDE=]LOW:HIGH")
    ] = None
    guide_place: Annotated[
        list[str] | None,
        _option("Where a guide acts in a step: variance, score, before_clip or shift.", "[GUIDE=]PLACE"),
    ] = None
    guide_clip: Annotated[
        bool | None,
        typer.Option(
            "--guide-clip/--no-guide-clip",
            help="Bound x_0 to [-1, 1] before the loss is computed.",
            rich_help_panel=_PANEL,
        ),
    ] = None

    @property
    def names(self) -> list[str]:
        """The names of the guides to use."""
        return list(self.guide or ())

    def check(self) -> None:
        """Refuse guide options without a guide, and a guide that is named twice.

        Raises:
            RequestError: naming the option or the guide.
        """
        twice = next((name for name in self.names if self.names.count(name) > 1), None)
        if twice is not None:
            raise RequestError(f"--guide {twice} was given twice")
        for option in (field.name for field in fields(self)):
            if not self.names and getattr(self, option) is not None:
                raise RequestError(
                    f"--{option.replace('_', '-')} is of a guide, and none guides",
                    hint="Name one with --guide.",
                )

    def choices(self, manifest: Manifest, bundle: Path) -> tuple[GuideChoice, ...] | None:
        """The guides' choices; None without guides.

        Raises:
            RequestError: for impossible choices.
        """
        from admtrt.schedule.guides import guide_choices

        if not self.names:
            return None
        scale = {name: _number(text) for name, text in self._by_guide(self.guide_scale, "--guide-scale")}
        interval = {
            name: interval_of(text) for name, text in self._by_guide(self.guide_interval, "--guide-interval")
        }
        place: Any = dict(self._by_guide(self.guide_place, "--guide-place"))
        clip = {} if self.guide_clip is None else dict.fromkeys(self.names, self.guide_clip)
        return guide_choices(
            manifest.guides, self.names, str(bundle), scale=scale, interval=interval, place=place, clip=clip
        )

    def targets(self, manifest: Manifest, mask: Path | None) -> GuideTargets:
        """Read the targets from the files.

        Args:
            manifest: the bundle's manifest.
            mask: the file of ``--mask``, used as the target ``mask`` of the one guide that takes a mask.

        Raises:
            RequestError: if a file cannot be read, or it is unclear which guide it belongs to.
        """
        from admtrt.contract import event_shape
        from admtrt.runtime.guide_targets import OPERATOR, GuideTargets, target_sizes
        from admtrt.runtime.images_in import read_mask

        event = event_shape(manifest.network)
        given: dict[str, dict[str, Any]] = {name: {} for name in self.names}
        for guide, text in self._by_guide(self.operator, "--operator"):
            given[guide][OPERATOR] = text
        for text in self.target or ():
            whole, equals, file = text.partition("=")
            guide, point, name = whole.rpartition(".")
            if not equals or not name or not file:  # an empty path would mean the current folder
                raise RequestError(f"--target {text!r} is not of the form [GUIDE.]NAME=FILE")
            guide = self._one(guide if point else None, "--target")
            config = manifest.guides[guide]
            sizes = target_sizes(guide, config, name, given[guide].get(OPERATOR), event)
            if name in given[guide]:
                raise RequestError(f"the target '{name}' of the guide '{guide}' was given twice")
            given[guide][name] = _read(Path(file), f"--target {name}", sizes, mask=name == "mask")
        if mask is not None:
            masked = [name for name in self.names if "mask" in manifest.guides[name].targets]
            if len(masked) != 1:
                raise RequestError(
                    "--mask is of --known, or of the one guide that takes a mask",
                    hint="Give it by --target GUIDE.mask=FILE.",
                )
            if "mask" in given[masked[0]]:
                raise RequestError(
                    f"--mask and --target mask= both give the mask of the guide '{masked[0]}'",
                    hint="Leave one out.",
                )
            given[masked[0]]["mask"] = read_mask(mask, event)
        return GuideTargets(given)

    def cost(self, manifest: Manifest, evaluations: int) -> str:
        """The guides' additional cost, for people; empty if unknown."""
        from admtrt.schedule.guides import GUIDE_GRAPH

        unet = manifest.graphs["unet"]
        entries = [manifest.graphs.get(f"{GUIDE_GRAPH}{name}", unet) for name in self.names]
        counts = [entry.operations for entry in entries]
        if unet.operations is None or None in counts or not counts:
            return ""
        # The graph of a loss of x_0 includes the UNet.
        alone = any(manifest.guides[name].kind == "denoiser" for name in self.names)
        total = sum(filter(None, counts)) + (0 if alone else unet.operations)
        memory = max(entry.peak_bytes or 0 for entry in (unet, *entries))
        return (
            f"a guided evaluation of one sample takes {total / 1e9:.3g} GFLOP "
            f"({total / unet.operations:.2f} times the UNet's) and up to {memory / 2**20:.0f} MiB besides "
            f"weights; all {evaluations} evaluations {total * evaluations / 1e12:.3g} TFLOP"
        )

    def _by_guide(self, texts: Sequence[str] | None, option: str) -> list[tuple[str, str]]:
        """Pair each value with its guide."""
        pairs = []
        for text in texts or ():
            guide, equals, value = text.partition("=")
            pairs.append((self._one(guide, option), value) if equals else (self._one(None, option), text))
        names = [guide for guide, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise RequestError(f"{option} was given twice for the guide '{twice}'")
        return pairs

    def _one(self, guide: str | None, option: str) -> str:
        if guide is None and len(self.names) == 1:
            return self.names[0]
        if guide is None:
            raise RequestError(
                f"{option} does not say of which guide: {', '.join(self.names)}",
                hint=f"Write e.g. {option} {self.names[0]}{'.NAME=FILE' if option == '--target' else '=...'}",
            )
        if guide not in self.names:
            raise RequestError(f"{option} is of the guide '{guide}', which does not guide")
        return guide


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"--guide-scale {text[:60]!r} is no number") from None


def _read(file: Path, option: str, sizes: tuple[int, ...], *, mask: bool) -> Any:
    """Read a target: pictures or a folder of them if it is an image, else arr_0 of an .npz."""
    from admtrt.runtime.images_in import PICTURES, read_images, read_mask, read_npz

    if mask and len(sizes) == 3:
        return read_mask(file, sizes)
    if len(sizes) == 3 and (file.is_dir() or file.suffix.lower() in PICTURES):
        return read_images(file, sizes, option)[0]

    def check(header: Header) -> None:
        if math.prod(header.shape[1:]) != math.prod(sizes):  # before decompressing
            listed = ", ".join(map(str, sizes))
            raise RequestError(f"{option} {file}: arr_0 is {header}; expected float32 [N, {listed}]")

    return read_npz(file, option, {"arr_0": check})["arr_0"]


takes_guide_options = takes_group(GuideOptions, "guide_options")
"""Adds the options of :class:`GuideOptions` to a command, as its parameter ``guide_options``."""


def interval_of(text: str) -> tuple[float, float]:
    """Parse two noise levels, ``LOW:HIGH``."""
    low, colon, high = text.partition(":")
    try:
        return float(low), float(high if colon else "")
    except ValueError:
        raise RequestError(
            f"the guidance interval {text!r} is not of the form LOW:HIGH",
            hint="Write two noise levels, e.g. 0.3:5.",
        ) from None
