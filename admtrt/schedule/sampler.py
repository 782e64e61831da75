"""Sampler configuration: a sampler's choices, checked against its solver's declaration."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Self, TypedDict

from pydantic import BeforeValidator, Field, field_validator, model_validator

from admtrt.config import EdmConfig
from admtrt.config_base import Config, later
from admtrt.config_values import NoiseLevel, Positive, PositiveFloat
from admtrt.schedule.guides import GuideChoice, check_choices
from admtrt.schedule.options import (
    OPTIONS,
    Direction,
    End,
    FinalOrder,
    Form,
    Grid,
    Levels,
    Order,
    Threshold,
    ThresholdOrder,
    Variant,
)
from admtrt.schedule.solvers import SOLVERS, solver_named
from admtrt.schedule.solvers.registry import AUTO, implied_solver, takers
from admtrt.schedule.spacing import is_spacing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from admtrt.config import DiffusionConfig


def _bound(value: Any) -> Any:
    """Normalise a bound of x_0 for storage: True stands for 1, False for 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return bool(value) if number and value in (0, 1) else value


class SamplerConfig(Config):
    """Sampler settings.

    ``method`` names a solver of :data:`~admtrt.schedule.solvers.SOLVERS`. ``steps`` is a respacing for ddpm
    and ddim (see :func:`admtrt.schedule.process.retained_timesteps`), where an int is accepted too, and a
    number of network evaluations for all other methods. ``scale`` multiplies the classifier's gradient, 0 =
    unguided. ``clip`` bounds x_0 to [-1, 1]; a number R bounds it to [-R, R]. ``guidance_interval`` (low,
    high) guides only the evaluations at a noise level sigma = sqrt((1 - alpha_bar) / alpha_bar) with low <
    sigma <= high (Kynkaanniemi et al. 2024); None guides all. ``guided_by`` lists further guides of the
    bundle to use. The other fields are the options of :mod:`admtrt.schedule.options`; None means the solver's
    default.
    """

    method: str = "ddpm"
    steps: Annotated[str, Field(coerce_numbers_to_str=True)] = "250"
    scale: float = 1.0
    eta: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    clip: Annotated[bool | PositiveFloat, BeforeValidator(_bound)] = True
    guidance_interval: tuple[NoiseLevel, NoiseLevel] | None = None
    order: Order | None = later(None)
    form: Form | None = later(None)
    sde: bool | None = later(None)
    variant: Variant | None = later(None)
    grid: Grid | None = later(None)
    to: End | None = later(None)
    denoise_to_zero: bool | None = later(None)
    threshold: Threshold | None = later(None)
    threshold_max: PositiveFloat | None = later(None)
    threshold_order: ThresholdOrder | None = later(None)
    final_order: FinalOrder | None = later(None)
    sigma: Levels | None = later(None)
    churn: tuple[NoiseLevel, NoiseLevel, NoiseLevel, PositiveFloat] | None = later(None)
    levels: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=2)] | None = later(None)
    levels_of: Annotated[Positive, Field(ge=2, le=100_000)] | None = later(None)
    direction: Direction | None = later(None)
    guided_by: tuple[GuideChoice, ...] = later(())

    def option(self, name: str) -> Any:
        """The value of a solver's option: the choice, else the default; None if the solver lacks it."""
        options = SOLVERS[self.method].options
        chosen = getattr(self, name)
        return options.get(name) if chosen is None or name not in options else chosen

    @property
    def chosen_options(self) -> dict[str, Any]:
        """The options that were chosen, by name."""
        fields = type(self).model_fields
        values = {name: getattr(self, name) for name in OPTIONS}
        return {name: value for name, value in values.items() if value not in (None, fields[name].default)}

    @property
    def bound(self) -> float | None:
        """The bound of |x_0|; None if unbounded."""
        return 1.0 if self.clip is True else self.clip or None

    @property
    def unguided(self) -> SamplerConfig:
        """The same sampler without the classifier's guidance."""
        return self.model_copy(update={"scale": 0.0, "guidance_interval": None})  # keeps ``guided_by``

    @field_validator("method")
    @classmethod
    def _check_method(cls, method: str) -> str:
        return solver_named(method).name

    @field_validator("scale")
    @classmethod
    def _check_scale(cls, scale: float) -> float:
        if abs(scale) > 1e6:
            raise ValueError(
                f"{scale} is out of range; guidance scales lie between 0 and about 100, "
                "or below 0 to avoid a class"
            )
        return scale

    @field_validator("guidance_interval")
    @classmethod
    def _check_interval(cls, interval: tuple[float, float] | None) -> tuple[float, float] | None:
        if interval is not None and not interval[0] < interval[1]:
            raise ValueError(
                f"{interval[0]:g} to {interval[1]:g} is empty; the first is the lower noise level"
            )
        return interval

    @field_validator("churn")
    @classmethod
    def _check_churn(
        cls, churn: tuple[float, float, float, float] | None
    ) -> tuple[float, float, float, float] | None:
        if churn is not None and not churn[1] < churn[2]:
            raise ValueError(
                f"noise levels {churn[1]:g} to {churn[2]:g} are empty; the first is the lower one"
            )
        return churn

    @field_validator("levels")
    @classmethod
    def _check_levels(cls, levels: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if levels is not None and any(after <= before for before, after in pairwise(levels)):
            raise ValueError(f"{list(levels)} do not rise; the first is the noisiest level")
        return levels

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        chosen = SOLVERS[self.method]
        for name, value in self.chosen_options.items():
            if name not in chosen.options:
                raise ValueError(f"{name} belongs to {takers(name)}; {self.method} has no such choice")
            allowed = chosen.narrower.get(name)
            if allowed is not None and value not in allowed:
                raise ValueError(
                    f"{name} {value!r} is none of {self.method}'s: {', '.join(map(str, allowed))}"
                )
        if self.threshold is not None and not self.clip:
            raise ValueError(f"threshold '{self.threshold}' bounds x_0, but clip is False")
        if self.threshold_max is not None:
            if self.option("threshold") != "dynamic":
                raise ValueError("threshold_max bounds the dynamic threshold; threshold is 'static'")
            if self.threshold_max < (self.bound or 0.0):
                raise ValueError(f"threshold_max {self.threshold_max:g} is below the bound {self.bound:g}")
        check_choices(self.guided_by, self.method, respaced=chosen.steps == "respacing")
        return self


class SamplerChoices(TypedDict, total=False):
    """Choices that replace those of a recommended sampler, see :class:`SamplerConfig`; None keeps one."""

    method: str | None
    steps: str | int | None
    scale: float | None
    eta: float | None
    clip: bool | float | None
    guidance_interval: tuple[float, float] | None
    order: Order | None
    form: Form | None
    sde: bool | None
    variant: Variant | None
    grid: Grid | None
    to: End | None
    denoise_to_zero: bool | None
    threshold: Threshold | None
    threshold_max: float | None
    threshold_order: ThresholdOrder | None
    final_order: FinalOrder | None
    sigma: Levels | None
    churn: tuple[float, float, float, float] | None
    levels: tuple[int, ...] | None
    levels_of: int | None
    direction: Direction | None
    guided_by: tuple[GuideChoice, ...] | None


def with_choices(
    sampler: SamplerConfig, process: DiffusionConfig | EdmConfig, choices: SamplerChoices | Mapping[str, Any]
) -> SamplerConfig:
    """Replace a recommended sampler's choices by those that are not None.

    On a discrete process, ``steps`` without a method imply one: ``ddim`` for "ddimN", else ``ddpm``;
    diffusers' spacings keep a recommended method that respaces. The method :data:`AUTO` keeps the recommended
    one. Another method starts from its own defaults, and from its own number of steps if the recommended
    steps have another meaning for it.

    Raises:
        ConfigError: if the result is impossible.
    """
    chosen: dict[str, Any] = {name: value for name, value in choices.items() if value is not None}
    if "steps" in chosen:
        chosen["steps"] = str(chosen["steps"])
    if "method" not in chosen and "steps" in chosen and not isinstance(process, EdmConfig):
        stays = is_spacing(chosen["steps"]) and solver_named(sampler.method).steps == "respacing"
        chosen["method"] = sampler.method if stays else implied_solver(chosen["steps"]).name
    if chosen.get("method") == AUTO:
        del chosen["method"]
    kept = sampler.to_dict()
    if chosen.get("clip") is False:
        kept = {name: value for name, value in kept.items() if not name.startswith("threshold")}
    elif chosen.get("threshold") == "static":
        kept.pop("threshold_max", None)
    if isinstance(chosen.get("levels"), list | tuple):
        chosen.setdefault("steps", str(len(chosen["levels"]) - 1))
    elif chosen.get("steps", sampler.steps) != sampler.steps:
        kept.pop("levels", None)  # they belong to another number of evaluations
    method = SOLVERS.get(chosen.get("method", sampler.method))
    if method is not None and method.name != sampler.method:
        kept = {name: value for name, value in kept.items() if name not in OPTIONS}
        if method.steps != SOLVERS[sampler.method].steps:
            kept["steps"] = method.default_steps
    return SamplerConfig.from_dict(kept | chosen, source="sampler")
