"""Read the ``config.json`` of a ``UNet2DModel`` as an ADM UNet.

Every option is translated to a setting of :class:`~admtrt.config.UNetConfig` or refused by name and value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from admtrt.config import UNetConfig
from admtrt.errors import CheckpointError, ConfigError
from admtrt.models.diffusers.values import Values
from admtrt.models.infer import multiplier

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

CLASS = "UNet2DModel"
MIDDLE_NORM = "mid_block.attentions.0.group_norm.weight"
DEFAULTS: Mapping[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,  # only for learned time embeddings, which are refused
}
_OF_AVERAGES = frozenset(
    {
        "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step",
        "use_ema_warmup",
    }
)  # fmt: skip
"""Keys stored with averaged weights."""
_OLD_PREFIX = "UNetRes"  # former prefix of block types, which diffusers also removes
_DOWN, _UP = ("DownBlock2D", "UpBlock2D")
_RESAMPLING = {"conv": False, None: False, "resnet": True}


@dataclass(frozen=True)
class Network:
    """A network as described by a file.

    Attributes:
        config: its ADM configuration.
        sines_first: whether the time embedding puts sines before cosines.
        notes: notes for the user.
    """

    config: UNetConfig
    sines_first: bool
    notes: tuple[str, ...]


def check_class(file: Path, data: Mapping[str, Any]) -> None:
    """Refuse a file of another class.

    Raises:
        CheckpointError: naming the file and the class.
    """
    name = data.get("_class_name", CLASS)
    if name != CLASS:
        raise CheckpointError(
            f"{file} is of the class {str(name)[:60]!r}; expected {CLASS}",
            hint="Only unconditional and class-conditional image models are ADM networks.",
        )


def read_network(file: Path, data: Mapping[str, Any], names: Collection[str]) -> Network:
    """Read the network of a file.

    Args:
        file: for messages.
        data: the content of the file.
        names: names of the tensors beside the file.

    Raises:
        CheckpointError: naming the file, a key and its value.
    """
    values = Values(file, data, DEFAULTS)
    values.check_unknown(_OF_AVERAGES)
    _check_fixed(values)
    channels = _channels(values)
    size = _size(values, len(channels))
    down, up = (
        _types(values, "down_block_types", len(channels)),
        _types(values, "up_block_types", len(channels)),
    )
    attends = [kind.startswith("Attn") for kind in down]
    if attends != [kind.startswith("Attn") for kind in reversed(up)]:
        raise values.refused(
            "up_block_types", f"it attends at other levels than down_block_types {down}, and ADM at the same"
        )
    scale_shift = values.choice("resnet_time_scale_shift", {"default": False, "scale_shift": True})
    _check_middle_norm(values, names, scale_shift=scale_shift)
    resblocks = _halved_by_blocks(values, down, up)
    settings = {
        "image_size": size,
        "in_channels": values.whole("in_channels", 1, 4),
        "model_channels": channels[0],
        "num_res_blocks": values.whole("layers_per_block", 1, 32),
        "channel_mult": [multiplier(width, channels[0]) for width in channels],
        "attention_resolutions": [size >> level for level, attending in enumerate(attends) if attending],
        **_heads(
            values, {width for width, attending in zip(channels, attends, strict=True) if attending}, channels
        ),
        "new_attention_order": True,
        "resblock_updown": resblocks,
        "scale_shift_norm": scale_shift,
        "dropout": values.number("dropout"),
        "num_classes": None if values["num_class_embeds"] is None else values.whole("num_class_embeds", 1),
        "learn_sigma": _learns_sigma(values),
        "frequency_shift": values.choice("freq_shift", {0: 0, 1: 1}),
        "norm_eps": values.number("norm_eps"),
        "norm_groups": _groups(values, channels),
    }
    if len(channels) > 1 and not resblocks:
        settings["downsample_padding"] = values.choice("downsample_padding", {0: "after", 1: "both"})
    try:
        config = UNetConfig.from_dict(settings, source=str(file))
    except ConfigError as error:
        raise CheckpointError(error.message) from None
    return Network(config, not values.flag("flip_sin_to_cos"), tuple(values.notes))


def _check_fixed(values: Values) -> None:
    """Refuse options whose value differs from the only one that ADM supports."""
    values.fixed("time_embedding_type", "positional")
    values.fixed("center_input_sample", False)  # zero padding keeps it from going into the first convolution
    values.fixed("add_attention", True)
    values.fixed("mid_block_type", "UNetMidBlock2D")
    values.fixed("mid_block_scale_factor", 1)
    values.fixed("act_fn", "silu", "swish")
    values.fixed("class_embed_type", None)


def _channels(values: Values) -> list[int]:
    channels = values["block_out_channels"]
    whole = isinstance(channels, list) and all(
        isinstance(width, int) and not isinstance(width, bool) and 0 < width <= 2**16 for width in channels
    )
    if not whole or not channels or len(channels) > 16:
        raise values.refused("block_out_channels", "expected a list of widths, one for each level")
    if values["time_embedding_dim"] not in (None, 4 * channels[0]):
        raise values.refused("time_embedding_dim", f"ADM has 4 times the first width, {4 * channels[0]}")
    widths: list[int] = channels
    return widths


def _size(values: Values, levels: int) -> int:
    size = values["sample_size"]
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise values.refused("sample_size", "expected the height and width of square images")
    if size % (1 << (levels - 1)):
        raise values.refused("sample_size", f"{levels} levels need a multiple of {1 << (levels - 1)}")
    return size


def _types(values: Values, key: str, levels: int) -> list[str]:
    """The block type of each level."""
    kinds = values[key]
    if not isinstance(kinds, list) or len(kinds) != levels:
        raise values.refused(key, f"expected a list of {levels}, as block_out_channels has")
    base, resampling = (_DOWN, "Downsample") if key.startswith("down") else (_UP, "Upsample")
    known = (base, f"Attn{base}", f"Resnet{resampling}Block2D")
    found = []
    for kind in kinds:
        name = kind.removeprefix(_OLD_PREFIX) if isinstance(kind, str) else kind
        if name not in known:
            raise values.refused(key, f"ADM has {', '.join(known)} alone")
        found.append(name)
    return found


def _halved_by_blocks(values: Values, down: list[str], up: list[str]) -> bool:
    """True if residual blocks resample instead of convolutions. The last level does not resample."""
    ways = {key: values.choice(key, _RESAMPLING) for key in ("downsample_type", "upsample_type")}

    def way(kind: str, key: str) -> bool:
        resampling: bool = ways[key] if kind.startswith("Attn") else kind.startswith("Resnet")
        return resampling

    found = {way(kind, "downsample_type") for kind in down[:-1]} | {
        way(kind, "upsample_type") for kind in up[:-1]
    }
    if len(found) > 1:
        raise values.refused(
            "down_block_types",
            f"with up_block_types {up}, downsample_type {values['downsample_type']} and upsample_type "
            f"{values['upsample_type']} some levels are resampled by convolutions, some by residual blocks; "
            "in ADM all are by one of the two",
        )
    return bool(found) and found.pop()


def _heads(values: Values, attending: set[int], channels: list[int]) -> dict[str, Any]:
    """Heads of attention, which shapes do not tell: a missing key is 8 channels a head, null is one head."""
    if values["attention_head_dim"] is None:
        values.notes.append("attention with one head (attention_head_dim null)")
        return {"num_heads": 1, "num_head_channels": None}
    width = values.whole("attention_head_dim", 1)
    for over in sorted(attending | {channels[-1]}):
        if over % width:
            raise values.refused("attention_head_dim", f"attention over {over} channels is not divided by it")
    missing = "" if "attention_head_dim" in values.data else ", the default: the key is missing"
    values.notes.append(f"attention with {width} channels a head (attention_head_dim {width}{missing})")
    return {"num_head_channels": width}


def _groups(values: Values, channels: list[int]) -> int:
    groups = values.whole("norm_num_groups", 1, 8192)
    for width in channels:
        if width % groups:
            raise values.refused("norm_num_groups", f"a level of {width} channels is not divided by it")
    if values["attn_norm_num_groups"] is not None and values.whole("attn_norm_num_groups", 1) != groups:
        raise values.refused(
            "attn_norm_num_groups", f"ADM has as many as elsewhere, norm_num_groups {groups}"
        )
    return groups


def _check_middle_norm(values: Values, names: Collection[str], *, scale_shift: bool) -> None:
    """Refuse middle attention without a norm, the default since v0.17 if no norm is configured."""
    if not scale_shift or values["attn_norm_num_groups"] is not None:
        return
    if MIDDLE_NORM not in names:
        raise values.refused(
            "attn_norm_num_groups",
            "with resnet_time_scale_shift 'scale_shift' the middle's attention has no norm then; ADM's has",
        )
    values.notes.append(
        "the norm of the middle's attention is used, since the file has it: the model is older than v0.17"
    )


def _learns_sigma(values: Values) -> bool:
    channels = values.whole("in_channels", 1, 4)
    out = values.whole("out_channels", 1)
    if out not in (channels, 2 * channels):
        raise values.refused("out_channels", f"ADM has in_channels {channels} or twice as many")
    return out == 2 * channels
