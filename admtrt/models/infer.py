"""Infer the configuration of a network from the names and shapes of its tensors.

Shapes determine widths, depth, attention levels, classes and more. They determine neither the image size of a
UNet, nor the attention heads, nor anything of the diffusion process. Settings that are not determined and
change the result are never guessed: the error asks for them by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from admtrt.config import DiffusionConfig, EdmConfig, UNetConfig, level_sizes
from admtrt.errors import CheckpointError, ConfigError
from admtrt.models.settings import CheckpointConfig, check_names, checkpoint_config_from_settings, parsed
from admtrt.presets import Kind

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of every tensor of a state dict by its bare name."""

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_MAX_CHANNELS = 4  # channels of images
_HEADS = ("num_heads", "num_head_channels")
_PROCESS = ("schedule", "steps", "rescale_timesteps")
_OUTPUT = ("mean_type", "variance_type")
_STAGE = re.compile(r"input_blocks\.(\d{1,4})\.")
_CONDITION = (
    "these are the channels of an upsampler, or of a network with another condition joined to x_t "
    "(segmentation, inpainting, colouring), which admtrt does not have"
)
_PREFIXES = ("_orig_mod.", "module.", "model.diffusion_model.", "denoise_fn.", "ema_model.", "ema.", "model.")
"""Prefixes that wrappers add to every name."""

UNTOLD = (
    "image_size",
    "low_res_size",
    *_HEADS,
    "num_heads_upsample",
    "new_attention_order",
    "conv_resample",
    "rescale_residuals",
    "dropout",
    "downsample_padding",
    "frequency_shift",
    "norm_eps",
    "norm_groups",
    *(name for name in DiffusionConfig.model_fields if name != "kind"),
)
"""Settings that shapes do not determine, or not for every network."""


class UntoldSettingError(CheckpointError):
    """A setting that shapes do not determine was not given."""


class _SeveralReadingsError(UntoldSettingError):
    """The shapes fit several networks; ``first`` has the settings that select the first."""

    def __init__(self, message: str, first: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.first = first


@dataclass(frozen=True)
class Traits:
    """The part of the configuration that shapes determine.

    Attributes:
        kind: the kind of network.
        settings: values of its configuration.
        attends: for each level, finest first, whether it has attention.
        side: height and width of the coarsest level, if a classifier's pooling determines it.
        pads_after: whether ``downsample_padding`` was given as ``after``, which rounds odd sizes down.
    """

    kind: Kind
    settings: Mapping[str, Any]
    attends: tuple[bool, ...]
    side: int | None = None
    pads_after: bool = False

    @property
    def _rounds_up(self) -> bool:
        # The choice shows only if strided convolutions downsample.
        return bool(self.settings.get("conv_resample")) and not self.pads_after

    def level_sizes(self, image_size: int) -> tuple[int, ...]:
        """Sizes of the levels for images of a size."""
        return level_sizes(image_size, len(self.attends), rounds_up=self._rounds_up)

    @property
    def image_sizes(self) -> tuple[int, int] | None:
        """The smallest and the largest image size that fit the coarsest level, if its size is known."""
        if self.side is None:
            return None
        count = 1 << (len(self.attends) - 1)
        if self._rounds_up:
            return (self.side - 1) * count + 1, self.side * count
        return self.side * count, (self.side + 1) * count - 1


def infer_config(
    shapes: Shapes,
    *,
    given: Mapping[str, Any],
    assumed: Mapping[str, Any] = _NOTHING,
    told: Mapping[str, Any] = _NOTHING,
    asks: Collection[str] = (),
) -> CheckpointConfig:
    """Infer the configuration of a network whose tensors have these shapes.

    Args:
        shapes: every tensor's shape by its bare name.
        given: known settings of the network and the process; they may not contradict the shapes.
        assumed: values of :data:`UNTOLD` settings, used if neither the shapes nor ``given`` determine them.
        told: settings that the file tells otherwise.
        asks: settings that must be given although they have defaults, such as ``kind`` if it is not clear.

    Raises:
        CheckpointError: if these are not the tensors of an ADM network, or ``given`` contradicts them.
        UntoldSettingError: naming a setting that must be given.
        ConfigError: for an unknown name or an impossible value in ``given``.
    """
    traits = traits_of(shapes, given, told=told)
    check_names(traits.kind, given)
    known = {**_usable(assumed, traits, given), **traits.settings, **parsed(given)}
    if "num_heads" in known and known.get("pool") != "attention":  # num_head_channels would override it
        known.setdefault("num_head_channels", None)
    size = known.get("image_size")
    if isinstance(size, int):
        _check_size(traits, size)
        resolutions = _resolutions(traits, size)
        known = {"attention_resolutions": resolutions} | known
        _check_given(given, {"attention_resolutions": resolutions})
    _check_given(given, traits.settings)
    # Such files may have either kind of process, unless a given setting implies a discrete one.
    plain = traits.settings.get("learn_sigma") or any(key in known for key in _PROCESS)
    either = "kind" in asks and not plain
    missing = _missing(traits, known, kind_untold=either)
    if missing:
        doubt = f"{_CONDITION}; " if "low_res_size" in missing else ""
        raise UntoldSettingError(f"{doubt}the shapes of the tensors do not tell {', '.join(missing)}")
    return checkpoint_config_from_settings(traits.kind, known)


def stand_in(shapes: Shapes, given: Mapping[str, Any] = _NOTHING) -> CheckpointConfig:
    """Any network with such tensors, if there is one; settings that shapes do not show are arbitrary.

    Raises:
        CheckpointError: if these are not the tensors of an ADM network.
    """
    traits = traits_of(shapes, given, any_reading=True)
    size = (traits.side or 2) << (len(traits.attends) - 1)
    learned = traits.settings.get("learn_sigma", True)
    made_up = {
        "image_size": size,
        "attention_resolutions": _resolutions(traits, size),
        "num_head_channels": 1,
        "norm_groups": parsed(given).get("norm_groups", UNetConfig.model_fields["norm_groups"].default),
        "variance_type": "learned_range" if learned else "fixed_large",
    }
    if traits.kind == "upsampler":
        made_up["low_res_size"] = 1
    try:
        return checkpoint_config_from_settings(traits.kind, made_up | dict(traits.settings))
    except ConfigError as error:
        raise CheckpointError(f"these are not the tensors of an ADM network: {error.message}") from None


def traits_of(
    shapes: Shapes,
    given: Mapping[str, Any] = _NOTHING,
    *,
    told: Mapping[str, Any] = _NOTHING,
    any_reading: bool = False,
) -> Traits:
    """The configuration that shapes determine; ``given`` is used only if they are ambiguous.

    Args:
        shapes: every tensor's shape by its bare name.
        given: known settings.
        told: settings known from the file's layout, added to the result.
        any_reading: accept an arbitrary one of several possible readings.

    Raises:
        CheckpointError: if these are not the tensors of an ADM network.
        UntoldSettingError: if a setting is needed to choose a reading.
    """
    values = parsed(given)
    while True:
        try:
            traits = _traits(shapes, values)
        except _SeveralReadingsError as error:
            if not any_reading:
                raise
            chosen = error.first.items() <= values.items()
            values = {**({} if chosen else values), **error.first}  # what was given may contradict them all
        else:
            return replace(traits, settings={**traits.settings, **told})


def _traits(shapes: Shapes, given: Mapping[str, Any]) -> Traits:
    width = _axis(shapes, "time_embed.0.weight", 1)
    is_classifier = not any(key.startswith("output_blocks.") for key in shapes)
    layout = _layout(_stages(shapes), None if is_classifier else _upsampling_blocks(shapes), given)
    block = "input_blocks.1.0."
    embedded = _axis(shapes, f"{block}emb_layers.1.weight", 0)
    settings: dict[str, Any] = {
        "model_channels": width,
        "num_res_blocks": layout.num_res_blocks,
        "channel_mult": tuple(multiplier(level.width, width) for level in layout.levels),
        "scale_shift_norm": embedded == 2 * _axis(shapes, f"{block}out_layers.0.weight", 0),
    }
    if layout.resampling is not None:
        settings["resblock_updown"] = layout.resampling == "block"
    if layout.resampling in ("conv", "pool"):  # irrelevant if residual blocks resample
        settings["conv_resample"] = layout.resampling == "conv"
    attends = tuple(level.attends for level in layout.levels)
    first = _axis(shapes, "input_blocks.0.0.weight", 1)
    if is_classifier:
        head, side = _classifier_head(shapes)
        if side is not None and len(attends) == 1:
            head["image_size"] = side
        after = given.get("downsample_padding") == "after"
        return Traits("classifier", settings | head | {"in_channels": first}, attends, side, after)
    kind, ends = _ends(first, _axis(shapes, "out.2.weight", 0), given)
    key = "label_emb.weight"
    classes = _axis(shapes, key, 0) if key in shapes else None
    return Traits(kind, settings | ends | {"num_classes": classes}, attends)


def _axis(shapes: Shapes, key: str, axis: int) -> int:
    shape = shapes.get(key)
    if shape is None or len(shape) <= axis:
        found = "no tensor" if shape is None else f"a tensor of shape {list(shape)} as"
        prefix = next((one.removesuffix(key) for one in shapes if one.endswith(f".{key}")), None)
        prefix = prefix or next((one for one in _PREFIXES if any(k.startswith(one) for k in shapes)), None)
        where = f"; there are names that begin with '{prefix}'" if shape is None and prefix else ""
        raise CheckpointError(
            f"these are not the tensors of an ADM network: there is {found} {key}{where}",
            hint="ADM networks have the keys of the original code's UNet or classifier.",
        )
    return shape[axis]


def multiplier(width: int, model_channels: int) -> float:
    """The channel multiplier that gives a level's width after rounding down."""
    multiplier = width / max(model_channels, 1)
    return multiplier if int(multiplier * model_channels) == width else math.nextafter(multiplier, math.inf)


# --- depth ------------------------------------------------------------------------------------------------


class _InputBlock(NamedTuple):
    """An input block: a residual block (with or without attention), a strided convolution, or pooling."""

    layer: Literal["block", "conv", "pool"]
    width: int
    attends: bool


class _Layout(NamedTuple):
    num_res_blocks: int
    levels: tuple[_InputBlock, ...]
    resampling: Literal["block", "conv", "pool"] | None


def _stages(shapes: Shapes) -> list[_InputBlock]:
    """The input blocks after the first convolution; pooling has no tensors and leaves a gap."""
    present = {int(found[1]) for key in shapes if (found := _STAGE.match(key))}
    stages: list[_InputBlock] = []
    for index in range(1, max(present, default=0) + 1):
        prefix = f"input_blocks.{index}."
        if index not in present:
            stages.append(_InputBlock("pool", stages[-1].width if stages else 0, attends=False))
        elif f"{prefix}0.op.weight" in shapes:
            stages.append(_InputBlock("conv", _axis(shapes, f"{prefix}0.op.weight", 0), attends=False))
        else:
            width = _axis(shapes, f"{prefix}0.out_layers.0.weight", 0)
            stages.append(_InputBlock("block", width, attends=f"{prefix}1.qkv.weight" in shapes))
    return stages


def _upsampling_blocks(shapes: Shapes) -> set[int]:
    """The output blocks that end with a second residual block, which upsamples."""
    found = (re.match(r"output_blocks\.(\d{1,4})\.[12]\.in_layers\.0\.weight$", key) for key in shapes)
    return {int(match[1]) for match in found if match}


def _layout(stages: list[_InputBlock], upsampling: set[int] | None, given: Mapping[str, Any]) -> _Layout:
    """Divide input blocks into levels: ``num_res_blocks`` each and, except in the last, a downsampling block.

    If residual blocks downsample, they look like any other. Then widths, attention and the decoder decide.
    """
    total = len(stages) + 1
    found = []
    for period in range(2, total + 1):
        groups = [stages[start : start + period] for start in range(0, total, period)]
        layout = None if total % period else _read_as(groups, period - 1)
        halved = layout is not None and layout.resampling == "block"
        expected = set(range(period - 1, total - 1, period)) if halved else set()
        if layout is not None and upsampling in (None, expected):
            found.append(layout)
    if not found:
        raise CheckpointError("these are not the tensors of an ADM network: its blocks do not form levels")
    if len(found) > 1:
        found = [one for one in found if one.num_res_blocks == given.get("num_res_blocks")] or found
    if len(found) > 1:
        depths = ", ".join(str(one.num_res_blocks) for one in found)
        raise _SeveralReadingsError(
            f"the shapes of the tensors do not tell num_res_blocks: it may be {depths}",
            {"num_res_blocks": found[0].num_res_blocks},
        )
    return found[0]


def _read_as(groups: list[list[_InputBlock]], num_res_blocks: int) -> _Layout | None:
    """The layout in which each group is a level, if the groups allow it."""
    levels = []
    for group in groups:
        blocks = set(group[:num_res_blocks])
        level = group[0]
        if len(blocks) > 1 or level.layer != "block":
            return None
        for last in group[num_res_blocks:]:
            if last.attends or last.width != level.width:
                return None
        levels.append(level)
    resampling = {group[num_res_blocks].layer for group in groups[:-1]}
    if len(resampling) > 1:
        return None
    return _Layout(num_res_blocks, tuple(levels), next(iter(resampling), None))


# --- ends -------------------------------------------------------------------------------------------------


def _ends(first: int, last: int, given: Mapping[str, Any]) -> tuple[Kind, dict[str, Any]]:
    """Kind, image channels and learned sigma, from the channels of the first and the last convolution."""
    found: list[tuple[int, dict[str, Any]]] = []  # (channels besides x_t, settings)
    for learn_sigma in (False, True):
        channels, rest = divmod(last, 1 + learn_sigma)
        if not rest and 1 <= channels <= min(first, _MAX_CHANNELS):
            found.append((first - channels, {"in_channels": channels, "learn_sigma": learn_sigma}))
    ends = f"the first convolution takes {first} channels and the last gives {last}"
    if not found:
        raise CheckpointError(f"{ends}: neither a UNet's nor an upsampler's")
    wanted = {key: given[key] for key in ("in_channels", "learn_sigma") if key in given}
    found = [one for one in found if wanted.items() <= one[1].items()] or found
    ours = [(joined, told) for joined, told in found if joined in (0, told["in_channels"])]
    if not ours:
        joined, told = found[0]
        raise CheckpointError(
            f"{ends}: a condition of {joined} channels is joined to x_t of {told['in_channels']}, as for "
            "segmentation, inpainting or colouring; admtrt has no such networks"
        )
    if len(ours) > 1 and "low_res_size" in given:
        ours = [one for one in ours if bool(one[0]) == (given["low_res_size"] is not None)]
    if len(ours) > 1:
        raise _SeveralReadingsError(
            f"the shapes of the tensors do not tell learn_sigma: with {first} channels in and {last} out "
            "this is a UNet without it or an upsampler with it",
            {"learn_sigma": False},
        )
    joined, told = ours[0]
    return ("upsampler" if joined else "unet"), told


def _classifier_head(shapes: Shapes) -> tuple[dict[str, Any], int | None]:
    """Pooling and class count and, for attention, the size of the coarsest level."""
    tokens = "out.2.positional_embedding"
    if tokens in shapes:
        positions = _axis(shapes, tokens, 1) - 1
        side = math.isqrt(max(positions, 0))
        if side < 1 or side**2 != positions:
            raise CheckpointError(f"{tokens} is of {positions} positions, which are those of no square image")
        return {"pool": "attention", "num_classes": _axis(shapes, "out.2.c_proj.weight", 0)}, side
    if len(shapes.get("out.0.weight", ())) == 2:  # a linear layer; other heads begin with a norm
        plain = "out.2.weight" in shapes
        key = "out.2.weight" if plain else "out.3.weight"
        return {"pool": "spatial" if plain else "spatial_v2", "num_classes": _axis(shapes, key, 0)}, None
    return {"pool": "adaptive", "num_classes": _axis(shapes, "out.3.weight", 0)}, None


# --- what shapes do not tell ------------------------------------------------------------------------------


def _usable(assumed: Mapping[str, Any], traits: Traits, given: Mapping[str, Any]) -> dict[str, Any]:
    """The assumptions that are compatible with the other settings."""
    usable = {key: value for key, value in assumed.items() if key in UNTOLD}
    if traits.side is not None and "image_size" in usable:
        fits = traits.level_sizes(usable["image_size"])[-1] == traits.side
        usable = usable if fits else {key: value for key, value in usable.items() if key != "image_size"}
    if any(key in given for key in _HEADS):  # given heads exclude assumed ones
        usable = {key: value for key, value in usable.items() if not key.startswith("num_head")}
    if traits.kind == "classifier":
        return usable
    if traits.kind == "unet":
        usable.pop("low_res_size", None)
    learned = str(usable.get("variance_type", "")).startswith("learned")
    if learned != traits.settings["learn_sigma"]:
        usable.pop("variance_type", None)
    return usable


def _missing(traits: Traits, known: Mapping[str, Any], *, kind_untold: bool) -> list[str]:
    names = ["image_size"]
    if traits.kind == "upsampler":
        names.append("low_res_size")
    names.append("new_attention_order")
    if known.get("kind") == "edm":
        names += [key for key, field in EdmConfig.model_fields.items() if field.is_required()]
    elif kind_untold and "kind" not in known:
        names.append("kind (discrete or edm)")
    else:
        names += _PROCESS
        if traits.kind != "classifier":
            names += _OUTPUT
    missing = [name for name in names if name not in known]
    if traits.image_sizes is not None and "image_size" in missing:
        missing[0] += " ({} to {})".format(*traits.image_sizes)
    two_counts = traits.kind != "classifier" and any(traits.attends)  # the decoder may have heads of its own
    if traits.settings.get("pool") == "attention":
        heads = "num_head_channels" not in known and "num_head_channels"
    elif not any(key in known for key in _HEADS):
        heads = (
            "num_heads with num_heads_upsample, or num_head_channels" if two_counts else " or ".join(_HEADS)
        )
    else:
        divided = known.get("num_head_channels") is None
        heads = two_counts and divided and "num_heads_upsample" not in known and "num_heads_upsample"
    return [*missing, heads] if heads else missing


def _check_size(traits: Traits, size: int) -> None:
    if traits.image_sizes is not None and traits.level_sizes(size)[-1] != traits.side:
        raise CheckpointError(
            "the shapes of the tensors say that image_size is {} to {}; ".format(*traits.image_sizes)
            + f"{size} was given"
        )


def _resolutions(traits: Traits, size: int) -> tuple[int, ...]:
    """The sizes of the levels with attention."""
    levels = list(zip(traits.level_sizes(size), traits.attends, strict=True))
    resolutions = dict.fromkeys(pixels for pixels, attends in levels if attends)
    if any(pixels in resolutions and not attends for pixels, attends in levels):
        raise CheckpointError(f"of the levels of one pixel of image_size {size}, not all have attention")
    return tuple(resolutions)


def _check_given(given: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    values = parsed(given)
    for key, value in told.items():
        if key not in given:
            continue
        ours, theirs = value, values[key]
        if key == "attention_resolutions" and isinstance(theirs, tuple):
            ours, theirs = set(ours), set(theirs)
        if ours != theirs:
            ours, theirs = (list(one) if isinstance(one, tuple) else one for one in (value, given[key]))
            raise CheckpointError(
                f"the shapes of the tensors say that {key} is {ours}; {theirs} was given",
                hint=f"Leave {key} out.",
            )
