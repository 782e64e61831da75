"""The configuration of a network from the names and shapes of its tensors.

Shapes tell widths, depth, attention levels, classes and more, but neither the image size of a UNet nor how
attention is split into heads, nor anything of the diffusion process. What they do not tell and what changes
the result is never guessed: it is asked for by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from admtrt.config import DiffusionConfig
from admtrt.errors import CheckpointError
from admtrt.models.settings import CheckpointConfig, check_names, checkpoint_config_from_settings
from admtrt.presets import Kind

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of every tensor of a state dict by its bare name."""

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_MAX_CHANNELS = 4  # of images
_HEADS = ("num_heads", "num_head_channels")
_PROCESS = ("schedule", "steps", "rescale_timesteps")
_OUTPUT = ("mean_type", "variance_type")
_STAGE = re.compile(r"input_blocks\.(\d{1,4})\.")

UNTOLD = (
    "image_size",
    "low_res_size",
    *_HEADS,
    "num_heads_upsample",
    "new_attention_order",
    "conv_resample",
    "rescale_residuals",
    "dropout",
    *DiffusionConfig.model_fields,
)
"""Settings that shapes do not tell, or not of every network."""


class UntoldSettingError(CheckpointError):
    """Something that shapes do not tell and that was not given."""


@dataclass(frozen=True)
class Traits:
    """What shapes tell.

    Attributes:
        kind: what the network is for.
        settings: values of its configuration.
        attends: for each level, finest first, whether it has attention.
    """

    kind: Kind
    settings: Mapping[str, Any]
    attends: tuple[bool, ...]


def infer_config(
    shapes: Shapes, *, given: Mapping[str, Any], assumed: Mapping[str, Any] = _NOTHING
) -> CheckpointConfig:
    """The configuration of the network whose tensors have these shapes.

    Args:
        shapes: every tensor's shape by its bare name.
        given: settings of the network and the process that are known; they may not contradict the shapes.
        assumed: values of :data:`UNTOLD` settings, used where neither the shapes nor ``given`` say.

    Raises:
        CheckpointError: if these are not the tensors of an ADM network, or ``given`` contradicts them.
        UntoldSettingError: if something must be given: by name.
        ConfigError: for an unknown name or an impossible value in ``given``.
    """
    traits = traits_of(shapes, given)
    check_names(traits.kind, given)
    known = {**_usable(assumed, traits, given), **traits.settings, **given}
    size = known.get("image_size")
    if isinstance(size, int):
        resolutions = tuple(size >> level for level, attends in enumerate(traits.attends) if attends)
        known = {"attention_resolutions": resolutions} | known
        _check_given(given, {"attention_resolutions": resolutions})
    _check_given(given, traits.settings)
    missing = _missing(traits, known)
    if missing:
        raise UntoldSettingError(f"the shapes of the tensors do not tell {', '.join(missing)}")
    return checkpoint_config_from_settings(traits.kind, known)


def traits_of(shapes: Shapes, given: Mapping[str, Any] = _NOTHING) -> Traits:
    """What shapes tell, with ``given`` only where they allow several readings.

    Raises:
        CheckpointError: if these are not the tensors of an ADM network.
        UntoldSettingError: if something must be given to choose a reading.
    """
    width = _axis(shapes, "time_embed.0.weight", 1)
    is_classifier = not any(key.startswith("output_blocks.") for key in shapes)
    layout = _layout(_stages(shapes), None if is_classifier else _upsampling_blocks(shapes), given)
    block = "input_blocks.1.0."
    embedded = _axis(shapes, f"{block}emb_layers.1.weight", 0)
    settings: dict[str, Any] = {
        "model_channels": width,
        "num_res_blocks": layout.num_res_blocks,
        "channel_mult": tuple(_multiplier(level.width, width) for level in layout.levels),
        "scale_shift_norm": embedded == 2 * _axis(shapes, f"{block}out_layers.0.weight", 0),
    }
    if layout.resampling is not None:
        settings["resblock_updown"] = layout.resampling == "block"
    if layout.resampling in ("conv", "pool"):  # which a block makes irrelevant
        settings["conv_resample"] = layout.resampling == "conv"
    attends = tuple(level.attends for level in layout.levels)
    first = _axis(shapes, "input_blocks.0.0.weight", 1)
    if is_classifier:
        head = _classifier_head(shapes, halvings=len(attends) - 1)
        return Traits("classifier", settings | head | {"in_channels": first}, attends)
    kind, ends = _ends(first, _axis(shapes, "out.2.weight", 0), given)
    key = "label_emb.weight"
    classes = _axis(shapes, key, 0) if key in shapes else None
    return Traits(kind, settings | ends | {"num_classes": classes}, attends)


def _axis(shapes: Shapes, key: str, axis: int) -> int:
    shape = shapes.get(key)
    if shape is None or len(shape) <= axis:
        found = "no tensor" if shape is None else f"a tensor of shape {list(shape)} as"
        raise CheckpointError(
            f"these are not the tensors of an ADM network: there is {found} {key}",
            hint="ADM networks have the keys of the original code's UNet or classifier.",
        )
    return shape[axis]


def _multiplier(width: int, model_channels: int) -> float:
    """The multiplier whose product, rounded down, is a level's width."""
    multiplier = width / max(model_channels, 1)
    return multiplier if int(multiplier * model_channels) == width else math.nextafter(multiplier, math.inf)


# --- depth ------------------------------------------------------------------------------------------------


class _Stage(NamedTuple):
    """An input block: a residual one (perhaps with attention), a strided convolution, or pooling."""

    layer: Literal["block", "conv", "pool"]
    width: int
    attends: bool


class _Layout(NamedTuple):
    num_res_blocks: int
    levels: tuple[_Stage, ...]
    resampling: Literal["block", "conv", "pool"] | None


def _stages(shapes: Shapes) -> list[_Stage]:
    """The input blocks after the first convolution; pooling has no tensors and leaves a gap."""
    present = {int(found[1]) for key in shapes if (found := _STAGE.match(key))}
    stages: list[_Stage] = []
    for index in range(1, max(present, default=0) + 1):
        prefix = f"input_blocks.{index}."
        if index not in present:
            stages.append(_Stage("pool", stages[-1].width if stages else 0, attends=False))
        elif f"{prefix}0.op.weight" in shapes:
            stages.append(_Stage("conv", _axis(shapes, f"{prefix}0.op.weight", 0), attends=False))
        else:
            width = _axis(shapes, f"{prefix}0.out_layers.0.weight", 0)
            stages.append(_Stage("block", width, attends=f"{prefix}1.qkv.weight" in shapes))
    return stages


def _upsampling_blocks(shapes: Shapes) -> set[int]:
    """The output blocks that end with a second residual block, which doubles the size."""
    found = (re.match(r"output_blocks\.(\d{1,4})\.[12]\.in_layers\.0\.weight$", key) for key in shapes)
    return {int(match[1]) for match in found if match}


def _layout(stages: list[_Stage], upsampling: set[int] | None, given: Mapping[str, Any]) -> _Layout:
    """How input blocks divide into levels: each ``num_res_blocks`` and, but for the last, one that halves.

    Where a block does the halving it looks like any other: then widths, attention and the decoder decide.
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
        raise UntoldSettingError(f"the shapes of the tensors do not tell num_res_blocks: it may be {depths}")
    return found[0]


def _read_as(groups: list[list[_Stage]], num_res_blocks: int) -> _Layout | None:
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
    """Kind, image channels and learned sigma from what the first and the last convolution take and give."""
    found: list[tuple[Kind, dict[str, Any]]] = []
    kinds: tuple[tuple[Kind, int], ...] = (("unet", 1), ("upsampler", 2))  # which also sees an enlarged image
    for kind, images in kinds:
        for learn_sigma in (False, True):
            channels = first // images
            if first % images == 0 and channels <= _MAX_CHANNELS and last == channels * (1 + learn_sigma):
                found.append((kind, {"in_channels": channels, "learn_sigma": learn_sigma}))
    if not found:
        raise CheckpointError(
            f"the first convolution takes {first} channels and the last gives {last}: neither a UNet's nor "
            "an upsampler's"
        )
    if len(found) > 1:
        wanted = {key: given[key] for key in ("in_channels", "learn_sigma") if key in given}
        found = [(kind, ends) for kind, ends in found if wanted.items() <= ends.items()] or found
    if len(found) > 1 and "low_res_size" in given:
        found = [one for one in found if (one[0] == "upsampler") == (given["low_res_size"] is not None)]
    if len(found) > 1:
        raise UntoldSettingError(
            f"the shapes of the tensors do not tell learn_sigma: with {first} channels in and {last} out "
            "this is a UNet without it or an upsampler with it"
        )
    return found[0]


def _classifier_head(shapes: Shapes, *, halvings: int) -> dict[str, Any]:
    """Pooling, class count and, for attention, the image size."""
    tokens = "out.2.positional_embedding"
    if tokens in shapes:
        side = math.isqrt(max(_axis(shapes, tokens, 1) - 1, 0))
        classes = _axis(shapes, "out.2.c_proj.weight", 0)
        return {"pool": "attention", "num_classes": classes, "image_size": side << halvings}
    if len(shapes.get("out.0.weight", ())) == 2:  # a linear map, where the other heads normalise
        plain = "out.2.weight" in shapes
        key = "out.2.weight" if plain else "out.3.weight"
        return {"pool": "spatial" if plain else "spatial_v2", "num_classes": _axis(shapes, key, 0)}
    return {"pool": "adaptive", "num_classes": _axis(shapes, "out.3.weight", 0)}


# --- what shapes do not tell ------------------------------------------------------------------------------


def _usable(assumed: Mapping[str, Any], traits: Traits, given: Mapping[str, Any]) -> dict[str, Any]:
    """Assumptions that go with the rest."""
    usable = {key: value for key, value in assumed.items() if key in UNTOLD}
    if any(key in given for key in _HEADS):  # then of heads nothing but what was given
        usable = {key: value for key, value in usable.items() if not key.startswith("num_head")}
    if traits.kind == "classifier":
        return usable
    if traits.kind == "unet":
        usable.pop("low_res_size", None)
    learned = str(usable.get("variance_type", "")).startswith("learned")
    if learned != traits.settings["learn_sigma"]:
        usable.pop("variance_type", None)
    return usable


def _missing(traits: Traits, known: Mapping[str, Any]) -> list[str]:
    names = ["image_size"]
    if traits.kind == "upsampler":
        names.append("low_res_size")
    names += ["new_attention_order", *_PROCESS]
    if traits.kind != "classifier":
        names += _OUTPUT
    missing = [name for name in names if name not in known]
    if traits.settings.get("pool") == "attention":
        heads = "num_head_channels" not in known and "num_head_channels"
    else:
        heads = not any(key in known for key in _HEADS) and " or ".join(_HEADS)
    return [*missing, heads] if heads else missing


def _check_given(given: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    for key, value in told.items():
        if key not in given:
            continue
        ours, theirs = (list(one) if isinstance(one, tuple | list) else one for one in (value, given[key]))
        if key == "attention_resolutions" and isinstance(theirs, list):
            ours, theirs = (sorted(one, key=str) for one in (ours, theirs))
        if ours != theirs:
            raise CheckpointError(
                f"the shapes of the tensors say that {key} is {ours}; {theirs} was given",
                hint=f"Leave {key} out.",
            )
