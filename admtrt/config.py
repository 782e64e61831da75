"""Every configuration of admtrt: frozen, validated, serialisable, and the only home of defaults."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)

from admtrt.errors import ConfigError, OutputError
from admtrt.reading import read_small

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

GROUPS = 32
"""Groups of every group normalisation in ADM; channel counts are multiples of it."""

_TOML_NONE = "none"
_ORIGINAL_FLAGS = {
    "channels": "in_channels",
    "class_cond": "num_classes",
    "classifier_attention_resolutions": "attention_resolutions",
    "classifier_depth": "num_res_blocks",
    "classifier_pool": "pool",
    "classifier_resblock_updown": "resblock_updown",
    "classifier_use_scale_shift_norm": "scale_shift_norm",
    "classifier_width": "model_channels",
    "diffusion_steps": "steps",
    "large_size": "image_size",
    "noise_schedule": "schedule",
    "num_channels": "model_channels",
    "predict_xstart": "mean_type",
    "sigma_small": "variance_type",
    "small_size": "low_res_size",
    "use_new_attention_order": "new_attention_order",
    "use_scale_shift_norm": "scale_shift_norm",
}
_LARGEST_FILE = 2**20  # bytes
_WRITTEN = {"later": False}  # context of what is written to files
_LATER: dict[str, Any] = {"later": True}  # marks fields


def none_from_text(value: Any) -> Any:
    """None for the words that stand for it where there is no null; anything else as it is."""
    return None if value in (_TOML_NONE, "None") else value


def _none_from_flag(value: Any) -> Any:
    """As the original's flags for numbers of heads have it."""
    return None if value in (-1, "-1") else none_from_text(value)


def _list_from_text(value: Any) -> Any:
    """Lists as the original's flags have them: ``1,2,4``, or a single number."""
    if isinstance(value, str):
        return [part.strip() for part in value.strip("()[] ").split(",")]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


Positive = Annotated[int, Field(ge=1, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
BatchSize = Annotated[int, Field(ge=1, le=2**20)]
ImageSize = Annotated[int, Field(ge=1, le=8192)]
_OptionalPositive = Annotated[Positive | None, BeforeValidator(none_from_text)]
_OptionalSize = Annotated[ImageSize | None, BeforeValidator(none_from_text)]
_OptionalHeads = Annotated[Positive | None, BeforeValidator(_none_from_flag)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NoiseLevel = Annotated[float, Field(ge=0.0)]
_Multipliers = Annotated[tuple[Annotated[float, Field(gt=0, le=1024)], ...], BeforeValidator(_list_from_text)]
_Sizes = Annotated[tuple[Positive, ...], BeforeValidator(_list_from_text)]


def later(default: Any) -> Any:
    """A field that files written before it lack, and that is written only where it is not the default."""
    return Field(default=default, json_schema_extra=_LATER)


class Config(BaseModel):
    """Base of all configurations: immutable, hashable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "configuration") -> Self:
        """Build from plain data.

        Raises:
            ConfigError: for an unknown key (naming the nearest), a wrong type or an impossible combination.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"{source}: {_explain(error, cls)}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready data that :meth:`from_dict` turns back into an equal object.

        It is what files hold; comparisons take ``model_dump``, which has every field (see :func:`later`).
        """
        return self.model_dump(mode="json", context=_WRITTEN)

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        if info.context is _WRITTEN:
            for name, field in type(self).model_fields.items():
                if field.json_schema_extra is _LATER and getattr(self, name) == field.default:
                    del data[name]
        return data


def _explain(error: ValidationError, cls: type[BaseModel]) -> str:
    lines = []
    for item in error.errors(include_url=False):
        names, model = _place(item["loc"], cls)
        path = ".".join(names)
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key '{path}'" + _suggestion(names[-1], model))
        elif item["type"] == "missing":
            lines.append(f"'{path}' is required")
        elif item["type"] == "value_error":
            text = item["msg"].removeprefix("Value error, ")
            lines.append(f"'{path}': {text}" if path else text)
        elif item["type"] == "union_tag_invalid":
            kind, kinds = item["input"]["kind"], item["ctx"]["expected_tags"]
            near = nearest_name(str(kind), kinds.replace("'", "").split(", "))
            meant = f"; did you mean '{near}'?" if near else ""
            lines.append(f"'{path}.kind' is {_shown(kind)}; expected one of {kinds}{meant}")
        elif item["type"] == "union_tag_not_found":
            lines.append(f"'{path}' is {_shown(item['input'])}; input should be a table")
        else:
            lines.append(f"'{path}' is {_shown(item['input'])}; {item['msg'][0].lower()}{item['msg'][1:]}")
    return "; ".join(lines)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _place(loc: tuple[int | str, ...], cls: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """The names that lead to a fault, and the model that has the last of them, if one is known.

    Between the name of a field that takes several models and the names in it stands the chosen one's kind,
    which nobody wrote.
    """
    names: list[str] = []
    model: type[BaseModel] | None = cls
    choices: list[type[BaseModel]] = []
    for part in loc:
        chosen = next((one for one in choices if len(choices) > 1 and _kind_default(one) == part), None)
        if chosen is not None:
            model, choices = chosen, []
            continue
        if choices:
            model, choices = choices[0], []
        names.append(str(part))
        field = None if model is None else model.model_fields.get(str(part))
        if field is not None:
            choices = list(_models_in(field.annotation))
        # Otherwise a position in a list, or a name in a table, of what came before.
    return names, model


def _kind_default(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("kind")
    return None if field is None else field.default


def _suggestion(name: str, model: type[BaseModel] | None) -> str:
    if model is None:
        return ""
    names = sorted(model.model_fields)
    near = nearest_name(name, names)
    return f"; did you mean '{near}'?" if near else f" (known: {', '.join(names)})"


def nearest_name(name: str, known: Sequence[str]) -> str | None:
    """The key meant by an unknown one: its name in the original's flags, else the most similar known key."""
    if _ORIGINAL_FLAGS.get(name) in known:
        return _ORIGINAL_FLAGS[name]
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.5)), None)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def level_sizes(image_size: int, levels: int, *, rounds_up: bool) -> tuple[int, ...]:
    """Height and width of each level's feature maps, finest first.

    An odd size is halved as its layer does it: pooling rounds down, a strided convolution up.
    """
    sizes = [image_size]
    for _ in range(levels - 1):
        sizes.append((sizes[-1] + rounds_up) // 2)
    return tuple(sizes)


class BackboneConfig(Config):
    """What the UNet and the classifier share: the encoder's shape.

    ``attention_resolutions`` are sizes in pixels (32 = attention where feature maps are 32x32), as in the
    paper. ``num_head_channels`` takes precedence over ``num_heads``; in TOML, which has no null, ``"none"``
    stands for None. Lists may be written as the original's flags are, ``"1,2,4"``.
    """

    image_size: ImageSize
    in_channels: Annotated[int, Field(ge=1, le=4)] = 3
    # The bounds are far above any network in use, and low enough to build it without its weights in seconds.
    model_channels: Annotated[int, Field(ge=1, le=8192)] = 128
    num_res_blocks: Annotated[int, Field(ge=1, le=32)] = 2
    channel_mult: _Multipliers = (1, 2, 3, 4)
    attention_resolutions: _Sizes = (32, 16, 8)
    num_heads: Positive = 4
    num_head_channels: _OptionalHeads = None
    new_attention_order: bool = False
    conv_resample: bool = True
    resblock_updown: bool = False
    scale_shift_norm: bool = True
    rescale_residuals: bool = False
    dropout: Fraction = 0.0

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(int(mult * self.model_channels) for mult in self.channel_mult)

    @property
    def num_blocks(self) -> int:
        """Residual blocks of the encoder, those apart that only halve."""
        return len(self.channel_mult) * self.num_res_blocks

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Height and width of the feature maps of each level, finest first."""
        rounds_up = self.conv_resample and not self.resblock_updown
        return level_sizes(self.image_size, len(self.channel_mult), rounds_up=rounds_up)

    def _head_counts(self) -> tuple[int, ...]:
        return (self.num_heads,)

    def _can_be_halved(self) -> bool:
        return self.level_sizes[-1] > 0

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        given = self.model_fields_set
        if "num_heads" in given and "num_head_channels" not in given and self.num_head_channels is not None:
            raise ValueError(
                f"num_heads {self.num_heads} would be ignored beside the default num_head_channels "
                f"{self.num_head_channels}; set num_head_channels to 'none' as well"
            )
        return self

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if not self.channel_mult:
            raise ValueError("channel_mult is empty; give one multiplier for each level")
        halvings = len(self.channel_mult) - 1
        if not self._can_be_halved():
            raise ValueError(
                f"image_size {self.image_size} cannot be halved {halvings} times for the "
                f"{halvings + 1} levels of channel_mult; use a multiple of {1 << halvings} or fewer levels"
            )
        for channels in self.level_channels:
            if channels < 1 or channels % GROUPS:
                raise ValueError(
                    f"a level has {channels} channels (model_channels {self.model_channels} x channel_mult "
                    f"{list(self.channel_mult)}); group normalisation needs multiples of {GROUPS}"
                )
        if self.model_channels % 2:
            raise ValueError("model_channels must be even: half of the time embedding is sines, half cosines")
        unused = sorted(set(self.attention_resolutions) - set(self.level_sizes))
        if unused:
            raise ValueError(
                f"attention_resolutions {unused} are no level's size; "
                f"the levels are {list(self.level_sizes)} pixels"
            )
        attending = {
            c
            for c, s in zip(self.level_channels, self.level_sizes, strict=True)
            if s in self.attention_resolutions
        }
        for channels in sorted(attending | {self.level_channels[-1]}):
            for width, name in self._head_divisors():
                if channels % width:
                    raise ValueError(
                        f"attention over {channels} channels cannot be divided by {name} {width}"
                    )
        return self

    def _head_divisors(self) -> list[tuple[int, str]]:
        if self.num_head_channels is not None:
            return [(self.num_head_channels, "num_head_channels")]
        return [(heads, "num_heads") for heads in self._head_counts()]


class UNetConfig(BackboneConfig):
    """The ADM UNet; with ``low_res_size`` it is an upsampler conditioned on an image of that size.

    ``num_classes`` makes it class-conditional, ``learn_sigma`` doubles the output channels,
    ``num_heads_upsample`` overrides ``num_heads`` in the decoder. ``null_class`` is the index among its
    classes that stands for no class (classifier-free guidance) and cannot be asked for.
    """

    num_classes: _OptionalPositive = None
    learn_sigma: bool = True
    num_heads_upsample: _OptionalHeads = None
    low_res_size: _OptionalSize = None
    null_class: Annotated[int, Field(ge=0)] | None = later(None)

    @property
    def out_channels(self) -> int:
        """Channels of the network's output: C, or 2C where sigma is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def classes(self) -> int | None:
        """Classes that can be asked for: all but the null class; None without classes."""
        return (
            self.num_classes if self.num_classes is None or self.null_class is None else self.num_classes - 1
        )

    def own_labels(self, labels: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
        """The network's indices of classes that were asked for, int64 [N]; None where it has no classes."""
        if labels is None or self.num_classes is None or self.null_class is None:
            return None if self.num_classes is None else labels
        return labels + (labels >= self.null_class)

    def _head_counts(self) -> tuple[int, ...]:
        return (self.num_heads, self.num_heads_upsample or self.num_heads)

    def _can_be_halved(self) -> bool:
        # The decoder doubles what the encoder halved, and joins them.
        return self.image_size % (1 << (len(self.channel_mult) - 1)) == 0

    @model_validator(mode="after")
    def _check_null_class(self) -> Self:
        if self.null_class is not None and not self.null_class < (self.num_classes or 0) > 1:
            raise ValueError(
                f"null_class {self.null_class} is none of several classes: num_classes is {self.num_classes}"
            )
        return self

    @model_validator(mode="after")
    def _check_low_res(self) -> Self:
        if self.low_res_size is not None and self.low_res_size >= self.image_size:
            raise ValueError(f"low_res_size {self.low_res_size} is not below image_size {self.image_size}")
        return self


class ClassifierConfig(BackboneConfig):
    """The noisy classifier: the UNet's encoder with a pooling head over ``num_classes``."""

    num_classes: Annotated[int, Field(ge=2)]
    resblock_updown: bool = True
    num_head_channels: _OptionalHeads = 64
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] = "attention"

    @model_validator(mode="after")
    def _check_pool(self) -> Self:
        if self.pool == "attention" and self.num_head_channels is None:
            raise ValueError("pool 'attention' needs num_head_channels")
        return self


class DiffusionConfig(Config):
    """The diffusion process and what the network's output means.

    ``variance_type`` ``learned_range`` interpolates between beta~ and beta (IDDPM eq. 15).
    ``rescale_timesteps`` gives the network t * 1000 / steps, as IDDPM forks with T = 4000 were trained.
    """

    kind: Literal["discrete"] = later("discrete")
    steps: Annotated[int, Field(ge=2, le=1_000_000)] = 1000
    schedule: Literal["linear", "cosine"] = "linear"
    mean_type: Literal["eps", "x_0", "previous_x"] = "eps"
    variance_type: Literal["learned_range", "learned", "fixed_small", "fixed_large"] = "learned_range"
    rescale_timesteps: bool = False

    @model_validator(mode="after")
    def _check_betas(self) -> Self:
        if self.schedule == "linear" and self.steps <= 20:
            raise ValueError(
                f"a linear schedule of {self.steps} steps has beta >= 1; use 21 steps or more, or 'cosine'"
            )
        return self

    @property
    def time_factor(self) -> float:
        """The networks' ``t`` over the timestep."""
        return 1000.0 / self.steps if self.rescale_timesteps else 1.0

    @property
    def learns_sigma(self) -> bool:
        """Whether the network outputs variance channels."""
        return self.variance_type.startswith("learned")

    def check_variance(self, network: UNetConfig, name: str = "unet") -> None:
        """Refuse a UNet that outputs variance channels where the process has none, or the other way round.

        Raises:
            ValueError: naming both keys.
        """
        if network.learn_sigma != self.learns_sigma:
            raise ValueError(
                f"{name}.learn_sigma is {network.learn_sigma} but diffusion.variance_type is "
                f"'{self.variance_type}'"
            )


class EdmConfig(Config):
    """A continuous process with the preconditioning of Karras et al. 2022, as in openai/consistency_models.

    ``boundary`` says that the network is a consistency model, whose output is held to the identity at
    ``sigma_min`` (Song et al. 2023, appendix C). Networks are given t = 250 log of the noise level.
    """

    kind: Literal["edm"] = "edm"
    boundary: bool
    sigma_data: PositiveFloat = 0.5
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    rho: Annotated[float, Field(ge=1)] = 7.0

    @model_validator(mode="after")
    def _check_ends(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min:g} is not below sigma_max {self.sigma_max:g}")
        return self

    @property
    def time_factor(self) -> float:
        """No network of this kind counts timesteps, see :attr:`DiffusionConfig.time_factor`."""
        return 1.0

    @property
    def learns_sigma(self) -> bool:
        """No network of this kind outputs variance channels."""
        return False

    def check_variance(self, network: UNetConfig, name: str = "unet") -> None:
        """See :meth:`DiffusionConfig.check_variance`."""
        if network.learn_sigma:
            raise ValueError(f"{name}.learn_sigma is True but diffusion.kind 'edm' has no variance channels")


def _kind_of(process: Any) -> str | None:
    """The tag of a process; None for what is none."""
    if isinstance(process, dict):
        return str(process.get("kind", "discrete"))
    return getattr(process, "kind", None)


ProcessConfig = Annotated[
    Annotated[DiffusionConfig, Tag("discrete")] | Annotated[EdmConfig, Tag("edm")], Discriminator(_kind_of)
]
"""The process of a network by its ``kind``; one without, as older files have it, is discrete."""

ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(cls: type[ConfigT], path: Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a TOML file and apply ``section.key=value`` overrides (values in TOML notation, or plain text).

    Raises:
        ConfigError: if the file is missing or no TOML, or as :meth:`Config.from_dict`.
    """
    data = read_toml(path)
    apply_overrides(data, overrides)
    return cls.from_dict(data, source=str(path) if not overrides else f"{path} with overrides")


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ConfigError: if it is missing or no TOML.
    """
    import tomllib

    try:
        return tomllib.loads(read_small(path, _LARGEST_FILE).decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put ``section.key=value`` overrides into plain data.

    Raises:
        ConfigError: for one that is not of this form, or goes through a value.
    """
    for override in overrides:
        _apply_override(data, override)


def _apply_override(data: dict[str, Any], override: str) -> None:
    import tomllib

    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    for part in parts[:-1]:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override {override!r}: '{part}' is a value, not a section")
    data[parts[-1]] = value


def save_config(config: Config, path: Path) -> None:
    """Write a configuration as TOML that :func:`load_config` reads back; unset optional keys are left out."""
    try:
        path.write_text(_to_toml(_set_values(config)), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None


def _set_values(config: Config) -> dict[str, Any]:
    """Plain data without the keys that are None by default."""
    data = config.to_dict()
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Config):
            data[name] = _set_values(value)
        elif value is None and field.default is None:
            data.pop(name, None)
    return data


def _to_toml(data: Mapping[str, Any], section: str = "") -> str:
    values = [f"{key} = {_toml_value(value)}" for key, value in data.items() if not isinstance(value, dict)]
    text = (f"[{section}]\n" if section else "") + "".join(f"{line}\n" for line in values)
    for key, value in data.items():
        if isinstance(value, dict):
            text += "\n" + _to_toml(value, f"{section}.{key}" if section else key)
    return text.lstrip("\n")


def _toml_value(value: Any) -> str:
    import json

    if isinstance(value, list):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, float):
        return repr(value)
    # JSON's strings are TOML's, but for escaped halves of characters and for DEL, which TOML does not allow.
    text = json.dumps(_TOML_NONE if value is None else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")
