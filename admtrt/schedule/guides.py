"""Configuration of guides: by a loss of the predicted x_0, a loss of x_t, or a second network.

A guide gives a tensor g in every evaluation that it guides, and enters the update in one of these places,
with c = scale (1 - a) / sqrt(a), a = alpha_bar of the evaluation:

=============  ====================================  ======================================================
place          formula                               who
=============  ====================================  ======================================================
variance       x' += scale w g, w the variance       classifier guidance with DDPM (Algorithm 1)
score          m = d + c g, behind the bound         classifier guidance with DDIM (Algorithm 2)
before_clip    y += c g, before the bound            Universal Guidance
shift          x' += scale g                         Diffusion Posterior Sampling, MCG, FreeDoM
reference      value = value_ref +                   classifier-free guidance, autoguidance
               scale (value - value_ref)
=============  ====================================  ======================================================
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from admtrt.config import UNetConfig
from admtrt.config_base import Config
from admtrt.config_values import NoiseLevel, Positive
from admtrt.errors import ConfigError, RequestError
from admtrt.schedule.guidance import scales_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from admtrt.config import DiffusionConfig, EdmConfig
    from admtrt.schedule.levels import NoiseLevels
    from admtrt.schedule.rows import Rows

    Float64 = NDArray[np.float64]

LossPlace = Literal["variance", "score", "before_clip", "shift"]
"""Places where a gradient can enter the update."""
Place = Literal["variance", "score", "before_clip", "shift", "reference"]
LOSS_PLACES: tuple[LossPlace, ...] = get_args(LossPlace)
Kind = Literal["denoiser", "noisy", "reference"]
"""Kinds of guides: a loss of the UNet's predicted x_0, a loss of x_t, or a second network."""
GUIDE_COLUMNS = ("guidance", "x0_shift", "x0_from_grad", "shift")
"""Columns that each guide adds to ``update_full``, as COLUMN.NAME."""
GUIDE_GRAPH = "guide."
"""Prefix of the name of a guide's graph."""
LABELLED = frozenset({"classifier", "noisy"})
"""Built-in losses whose target :data:`WEIGHTS`, [classes], is made from labels if not given."""
WEIGHTS = "weights"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_TAKEN = frozenset(
    ("x", "t", "y", "low_res", "out", "grad", "value", "boosted", "x_0", "x_t")  # the graphs' tensors
)
_LARGEST_SCALE = 1e6


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name[:60]!r} is no name of a guide: small letters, digits and _, a letter first, at most 32"
        )
    return name


def _check_target(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name[:60]!r} is no name of a target: small letters, digits and _, a letter first, at most 32"
        )
    if name in _TAKEN or name.startswith(("x0", "guide_", "sqrt_one_")):
        raise ValueError(f"a target cannot be called {name!r}, which the graph has already")
    return name


def _check_scale(scale: float) -> float:
    if abs(scale) > _LARGEST_SCALE:
        raise ValueError(f"{scale:g} is out of range; at most {_LARGEST_SCALE:g} either way")
    return scale


def _check_normalise(text: str) -> str:
    kind, colon, number = text.partition(":")
    if kind in ("none", "unit", "eps") and not colon:
        return text
    try:
        if kind == "cap" and 0 < float(number) < float("inf"):
            return text
    except ValueError:
        pass
    raise ValueError(f"{text[:60]!r} is unknown; expected none, unit, eps, or cap:R with R above 0")


GuideName = Annotated[str, AfterValidator(_check_name)]
TargetName = Annotated[str, AfterValidator(_check_target)]
Scale = Annotated[float, AfterValidator(_check_scale)]
Normalise = Annotated[str, AfterValidator(_check_normalise)]


class GuideConfig(Config):
    """Description of a guide in a bundle.

    Attributes:
        kind: see :data:`~admtrt.schedule.guides.Kind`.
        loss: name of the built-in loss, or ``custom``.
        place: default of the place where it enters the update.
        scale: default of the scale.
        clip: whether the loss gets x_0 clipped to [-1, 1]; a clipped pixel has no gradient.
        normalise: normalisation of each sample's gradient: ``none``; ``unit``, length 1; ``eps``, to the root
            mean square of the network's output (FreeDoM); ``cap:R``, to a root mean square of at most R
            (Crowson).
        targets: further inputs of the loss by name, float32 ``[N, *sizes]``.
        level_input: whether the loss takes sqrt(1 - alpha_bar).
        network: configuration of a reference's network; None if it is the UNet with its null class.
    """

    kind: Kind = "denoiser"
    loss: str = "custom"
    place: Place = "shift"
    scale: Scale = 1.0
    clip: bool = True
    normalise: Normalise = "none"
    targets: dict[TargetName, tuple[Positive, ...]] = Field(default_factory=dict)
    level_input: bool = False
    network: UNetConfig | None = None

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if (self.place == "reference") != (self.kind == "reference"):
            raise ValueError(f"a guide of kind '{self.kind}' cannot enter in the place '{self.place}'")
        if self.kind == "reference" and (self.targets or self.normalise != "none"):
            raise ValueError("a reference takes no targets and is not normalised")
        if self.kind != "reference" and self.network is not None:
            raise ValueError(f"a guide of kind '{self.kind}' has no network of its own")
        return self


class GuideChoice(Config):
    """A sampler's choices for one guide; see :class:`GuideConfig`. ``interval`` is as for the classifier."""

    name: GuideName
    scale: Scale
    place: Place
    clip: bool = True
    interval: tuple[NoiseLevel, NoiseLevel] | None = None

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        if self.interval is not None and not self.interval[0] < self.interval[1]:
            low, high = self.interval
            raise ValueError(f"{low:g} to {high:g} is empty; the first is the lower noise level")
        return self


def check_choices(choices: tuple[GuideChoice, ...], method: str, *, respaced: bool) -> None:
    """Refuse guides in places that a solver does not support.

    Raises:
        ValueError: naming the guide.
    """
    names = [choice.name for choice in choices]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the guide '{twice}' is named twice")
    if sum(choice.place == "reference" for choice in choices) > 1:
        raise ValueError("two references at once are not possible")
    for choice in choices:
        if choice.place == "variance" and method != "ddpm":
            raise ValueError(
                f"guide '{choice.name}' enters by the variance, which ddpm alone has, not {method}; "
                "use the place score"
            )
        if choice.place == "shift" and not respaced:
            raise ValueError(
                f"guide '{choice.name}' shifts the state, which goes with ddpm and ddim, not with {method}; "
                "use the place score or before_clip"
            )


def columns_with_guides(columns: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    """The columns of ``update_full`` and ``threshold`` in a bundle with these guides, in order."""
    return (*columns, *(f"{column}.{name}" for name in names for column in GUIDE_COLUMNS))


def guide_columns(
    choice: GuideChoice,
    rows: Rows,
    table: dict[str, Float64],
    levels: NoiseLevels,
    process: DiffusionConfig | EdmConfig,
) -> dict[str, Float64]:
    """The columns of one guide by their name in :data:`GUIDE_COLUMNS`, float64 [R] each.

    Args:
        choice: the sampler's choice.
        rows: the solver's rows.
        table: the columns of the other terms.
        levels: of the process.
        process: of the networks.

    Raises:
        RequestError: if no evaluation lies in its interval.
    """
    sigma = np.array([level.sigma for level in rows.levels])
    scale = scales_in(sigma, choice.scale, choice.interval, off=1.0 if choice.place == "reference" else 0.0)
    columns = {name: np.zeros(len(rows)) for name in GUIDE_COLUMNS}
    # A jump back scales the whole next state.
    back = np.ones(len(rows)) if rows.edits is None else np.sqrt(1 - rows.edits[:, -1] ** 2)
    if choice.place == "reference":
        columns["x0_from_grad"] = (1 - scale) * table["x0_from_out"]
        columns["shift"] = (1 - scale) * table["prev_from_out"]
    elif choice.place == "shift":
        columns["shift"] = scale * back
    elif choice.place == "variance":
        small = getattr(process, "variance_type", None) == "fixed_small"
        # As for the classifier: the true posterior variance of the last step is 0.
        columns["guidance"] = scale * back * ((table["noise"] > 0) if small else 1.0)
    else:
        c = scale * sigma**2 * np.array([levels.c_in(level) for level in rows.levels])
        if choice.place == "before_clip":
            columns["x0_from_grad"] = c
        else:
            columns["x0_shift"] = c
            columns["shift"] = table["prev_from_x0"] * c
    return columns


def reference_factor(choices: tuple[GuideChoice, ...], sigma: Float64) -> Float64:
    """Weight of the network's own output when a reference guides, float64 [R]."""
    for choice in choices:
        if choice.place == "reference":
            return scales_in(sigma, choice.scale, choice.interval, off=1.0)
    return np.ones(len(sigma))


def guide_choices(
    known: Mapping[str, GuideConfig],
    names: Iterable[str],
    where: str,
    *,
    scale: Mapping[str, float] | None = None,
    interval: Mapping[str, tuple[float, float]] | None = None,
    place: Mapping[str, Place] | None = None,
    clip: Mapping[str, bool] | None = None,
) -> tuple[GuideChoice, ...]:
    """Check choices of guides and make a sampler's ``guided_by``.

    Args:
        known: the bundle's guides.
        names: names of the guides to use.
        where: where the guides are, for messages.
        scale, interval, place, clip: values by guide that replace its defaults.

    Raises:
        RequestError: for an unknown guide or an impossible choice.
    """
    chosen = list(names)
    given = {"scale": scale or {}, "interval": interval or {}, "place": place or {}, "clip": clip or {}}
    for what, theirs in given.items():
        idle = next((name for name in theirs if name not in chosen), None)
        if idle is not None:
            raise RequestError(f"{what} was given of the guide '{idle}', which does not guide")
    choices = []
    for name in chosen:
        if name not in known:
            raise unknown_guide(name, known, where)
        own = {field: getattr(known[name], field) for field in ("scale", "place", "clip")}
        own |= {what: theirs[name] for what, theirs in given.items() if name in theirs}
        if (own["place"] == "reference") != (known[name].place == "reference"):
            raise RequestError(f"guide '{name}' cannot enter in the place '{own['place']}'")
        try:
            choices.append(GuideChoice.from_dict({"name": name, **own}, source=f"guide '{name}'"))
        except ConfigError as error:
            raise RequestError(error.message) from None
    return tuple(choices)


def unknown_guide(name: str, known: Any, place: str) -> RequestError:
    """The error of an unknown guide."""
    listed = ", ".join(known)
    return RequestError(
        f"{place} has no guide '{name}'" + (f"; it has {listed}" if listed else " and no other"),
        hint=f"Export the checkpoint again with: --guide {name}",
    )
